"""A server whose members bear one mark each, by which it can be known whose they are.

Usage: python -I -S marked_server.py FILE MEMBER... It writes a line `MEMBER PID` into FILE for each, then "ready" to
its log. Members: `worker` (all marks), `session` (only the root's session), `environment` (a daemon that kept only its
environment), `log` (a daemon that kept only its log), `child` (bears nothing, but its parent, a `log`, lives),
`nothing` (a daemon that kept nothing at all).
"""

from __future__ import annotations

import os
import signal
import sys

_WAIT = [sys.executable, "-I", "-S", "-c", "import signal; signal.signal(15, signal.SIG_IGN); signal.pause()"]


def main() -> None:
    names = open(sys.argv[1], "w", encoding="ascii")  # noqa: SIM115 - each member writes to it
    for member in sys.argv[2:]:
        read_end, write_end = os.pipe()
        if os.fork() == 0:
            os.close(read_end)
            if member not in {"worker", "session"}:
                os.setsid()
                if os.fork():
                    os._exit(0)
            if member == "child":
                if os.fork():
                    be("log", None)
                os.setsid()
            print(member, os.getpid(), file=names, flush=True)
            be(member, write_end)
        os.close(write_end)
        os.read(read_end, 1)  # ends when the member executes its program
        os.close(read_end)
    os.write(1, b"ready\n")
    while True:
        signal.pause()


def be(member: str, _open_until_execve: int | None) -> None:
    if member not in {"worker", "log"}:
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
    os.execve(_WAIT[0], _WAIT, dict(os.environ) if member in {"worker", "environment"} else {})  # noqa: S606


if __name__ == "__main__":
    main()
