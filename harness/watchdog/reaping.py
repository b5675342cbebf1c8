"""Reaps children a batch at a time: between two batches the caller does what else is due.

Processes that fork and exit without end can leave zombies faster than they are reaped: forty such chains on one core
starved a watchdog that reaped until none was left, and nobody killed them.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_AT_ONCE = 1000


class Reaper:
    """Reaps the children of this process."""

    def __init__(self) -> None:
        """Begin with nothing to reap."""
        self.has_more = False  # there may be more to reap, and no signal tells of it
        self.has_no_child = False

    def batch(self) -> Iterator[tuple[int, int]]:
        """Reap children that have ended, but no more than 1,000 of them; give each, as waitpid(2) does, at once.

        Until the next is taken no new child can have this one's number: what a number stands for is looked up by then.
        """
        self.has_more = True
        self.has_no_child = False
        for _ in range(MOST_AT_ONCE):
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self.has_more = False
                self.has_no_child = True
                return
            if pid == 0:
                self.has_more = False
                return
            yield pid, status
