"""A tree that nobody may touch: each process leaves a file `PID-SIGNAL` in MARKS for whatever signal it gets.

Usage: python -I -S chaos_bystander.py MARKS [PROCS...]. It moves to each cgroup whose cgroup.procs is named, starts a
child and a daemon, and writes their pids and its own to MARKS/up. All of them end after LIFE_S, or when MARKS is
removed.
"""

import contextlib
import os
import signal
import sys
import time

_POLL_S = 2.0
_LIFE_S = 5400.0
_FREE = {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}


def note(number: int, _frame: object) -> None:
    """Leave a mark."""
    os.close(os.open(f"{sys.argv[1]}/{os.getpid()}-{number}", os.O_CREAT | os.O_WRONLY))


def stand_by(deadline: float) -> None:
    """Live until the marks' directory is removed."""
    for number in signal.valid_signals() - _FREE:
        with contextlib.suppress(OSError):  # two are glibc's own
            signal.signal(number, note)
    while os.path.isdir(sys.argv[1]) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    os._exit(0)


def main() -> None:
    """Move, fork, tell, live."""
    marks, *cgroups = sys.argv[1:]
    for path in cgroups:
        with open(path, "w", encoding="ascii") as procs:
            procs.write("0")
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    deadline = time.monotonic() + _LIFE_S
    child = os.fork()
    if child == 0:
        stand_by(deadline)
    read_end, write_end = os.pipe()
    between = os.fork()
    if between == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(write_end, str(os.getpid()).encode())
            stand_by(deadline)
        os._exit(0)
    os.waitpid(between, 0)
    daemon = int(os.read(read_end, 32))
    try:
        with open(f"{marks}/up.tmp", "w", encoding="ascii") as up:
            up.write(f"{os.getpid()} {child} {daemon}")
        os.rename(f"{marks}/up.tmp", f"{marks}/up")
    except FileNotFoundError:
        os._exit(0)  # the trial was over before this was up
    stand_by(deadline)


main()
