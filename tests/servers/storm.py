"""A server that forks as fast as it can, at most COUNT times in all: python -I -S storm.py COUNT.

Half of its processes end as soon as they have forked, so that a look at the tree misses those that hop over it; each
is in a session of its own. It says "ready" when the storm begins.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    tokens, given = os.pipe()
    os.write(given, b"x" * int(sys.argv[1]))
    os.close(given)
    os.write(1, b"ready\n")
    generation = 0
    while os.read(tokens, 1):
        if os.fork() == 0:
            os.setsid()
            generation += 1
        elif generation % 2:
            os._exit(0)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
