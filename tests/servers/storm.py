"""A server that forks without end until it is killed. Run with `python -I -S storm.py chains|bomb COUNT LIFE_S FIFO`.

`chains`: COUNT processes that hop: each makes a session of its own, forks, and exits, over and over. `bomb`: a tree
that grows to COUNT processes, each in a session of its own. All end by themselves after LIFE_S seconds at the latest.
Says `ready` once all are there. All hold FIFO open for writing: who reads it sees its end when none of them is left.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import NoReturn


def hop(until: float) -> NoReturn:
    """Live in one process after the other."""
    while time.monotonic() < until:
        os.setsid()
        if os.fork():
            os._exit(0)
    os._exit(0)


def grow(tokens: int, told: int, life_s: int) -> NoReturn:
    """Fork a child for each token that is to be had, and wait for the end."""
    signal.alarm(life_s)
    os.write(told, b"x")
    while os.read(tokens, 1):
        if os.fork() == 0:
            signal.alarm(life_s)
            os.setsid()
            os.write(told, b"x")
    while True:
        signal.pause()


def main(kind: str, count: int, life_s: int, fifo: str) -> None:
    """Begin, say that all are there, and wait."""
    os.open(fifo, os.O_WRONLY)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    if kind == "chains":
        until = time.monotonic() + life_s
        for _ in range(count):
            if os.fork() == 0:
                hop(until)
    else:
        tokens, pool = os.pipe()
        told, tell = os.pipe()
        os.write(pool, b"t" * (count - 1))
        os.close(pool)
        if os.fork() == 0:
            grow(tokens, tell, life_s)
        for _ in range(count):
            os.read(told, 1)
    signal.alarm(life_s)
    os.write(1, b"ready\n")
    while True:
        signal.pause()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
