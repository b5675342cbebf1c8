"""The test process's end of the program that shows what servers write: see `follower`."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import weakref
from pathlib import Path

_PROGRAM = Path(__file__).with_name("follower.py")
# For SIGKILL to be carried out; only a file system that does not answer can hold it up.
_KILLED_LIMIT_S = 5.0


class Follower:
    """Has a process of its own show what servers write, since a hung test process could not."""

    def __init__(self, stdout: int, *, with_colour: bool) -> None:
        """Start it, with this descriptor as its output; if that fails, nothing is ever shown."""
        self._owner = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        # Not Popen's own, whose file object a forked child would leave unclosed.
        self._pipe = -1
        _followers.add(self)
        with contextlib.suppress(OSError):
            self._start(stdout, "colour" if with_colour else "plain")

    def _start(self, stdout: int, look: str) -> None:
        command = [sys.executable, *_flags(), str(_PROGRAM), str(self._owner), look]
        orders, pipe = os.pipe()
        # Ctrl-C must not end it before it comes to ignore that: it inherits what is blocked.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process = subprocess.Popen(command, stdin=orders, stdout=stdout, stderr=subprocess.DEVNULL)
            os.set_blocking(pipe, False)
            self._pipe = pipe
        finally:
            os.close(orders)
            if self._process is None:
                os.close(pipe)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def follow(self, name: str, path: Path, start: int = 0) -> None:
        """Have a log shown from byte `start` on, line by line, each with the name of its server; a forked child may.

        Nothing happens if the program has ended, has 64 KiB of orders to read, or if name and path are some 4,000 bytes
        long: this waits for nobody, and never raises.
        """
        with contextlib.suppress(OSError):
            self._send({"name": name, "path": os.path.abspath(path), "start": start})

    @property
    def pid(self) -> int | None:
        """Give the program's process; None if it has none, or another process's."""
        return None if self._process is None or self._owner != os.getpid() else self._process.pid

    def _send(self, order: dict[str, object]) -> None:
        line = json.dumps(order).encode() + b"\n"
        # Up to this length a pipe takes all or nothing, also of several processes at a time (pipe(7)).
        if self._pipe >= 0 and len(line) <= select.PIPE_BUF:
            os.write(self._pipe, line)

    def close(self, limit_s: float = 5.0) -> None:
        """Have it show what has been written up to now, and wait for its end; it is killed if that takes longer."""
        process = self._process
        if process is None or self._owner != os.getpid():
            return
        # A process that was forked from this one may hold the pipe, so its end alone would not do.
        with contextlib.suppress(OSError):
            self._send({"end": True})
        self._process = None
        pipe, self._pipe = self._pipe, -1
        os.close(pipe)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limit_s)
        finally:
            process.kill()  # which does nothing to one that has been reaped
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILLED_LIMIT_S)

    def _disown(self) -> None:
        if self._process is not None:
            self._process.returncode = 0  # or Popen would warn, when this child ends, of a process that is not its own
            self._process = None


def _flags() -> list[str]:
    # Nothing of the test environment runs in it, but that by which coverage measures other processes; and paths must be
    # encoded as the test process decoded them.
    is_measured = "COVERAGE_PROCESS_START" in os.environ or "COVERAGE_PROCESS_CONFIG" in os.environ
    return ["-I", *([] if is_measured else ["-S"]), "-X", f"utf8={sys.flags.utf8_mode}"]


_followers: weakref.WeakSet[Follower] = weakref.WeakSet()


def pids() -> list[int]:
    """Give the processes of this process that follow logs."""
    return [follower.pid for follower in _followers if follower.pid is not None]


def _disown_all() -> None:
    for follower in _followers:
        follower._disown()  # noqa: SLF001 - of this module


if hasattr(os, "register_at_fork"):  # elsewhere nothing can be forked, nor a server be launched
    os.register_at_fork(after_in_child=_disown_all)
