"""What lost keepers leave behind: processes that the kernel re-parents to the watchdog, which asks and kills them."""

from __future__ import annotations

import os
import time

from harness import procfs
from harness.watchdog import events, sweep
from harness.watchdog.keeper_rules import FIRST_PAUSE_S, KILL_LIMIT_S, LONGEST_PAUSE_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Not until nothing new is found: a tree that forks on and on would hold the watchdog here.
_LOOKS = 3


class Orphans:
    """The watchdog's children that are not keepers."""

    def __init__(self, keepers: Callable[[], frozenset[int]]) -> None:
        """Take a function that gives the pids of all keepers, which are spared."""
        self._keepers = keepers
        self._sweeper = sweep.Sweeper()
        self._asked: set[int] = set()
        self._known: set[int] = set()
        self._is_waited_for = False
        self._kill_limit: float | None = None
        self._pause_s = FIRST_PAUSE_S
        self.deadline: float | None = None

    def fresh(self) -> list[int]:
        """Give the orphans that have come since the last call, with all below them."""
        found: dict[int, None] = {}
        # A child of one that ends between these two is in neither list; the next look finds it among this process's.
        for _ in range(_LOOKS):
            tops = set(procfs.children(os.getpid())) - self._keepers() - self._known
            self._known |= tops
            found.update(dict.fromkeys([*tops, *(pid for top in tops for pid in procfs.descendants(top))]))
        return list(found)

    def begin(self, *, kill: bool) -> None:
        """Ask the orphans, or begin to kill them."""
        self._is_waited_for = True
        self.deadline = time.monotonic()
        if kill and self._kill_limit is None:
            self._kill_limit = self.deadline + KILL_LIMIT_S

    def reaped(self, pids: list[int]) -> None:
        """Forget reaped processes, and look again at once."""
        self._asked.difference_update(pids)
        self._known.difference_update(pids)
        self._sweeper.forget(pids)
        if pids and self._is_waited_for:
            self._pause_s = FIRST_PAUSE_S
            self.deadline = time.monotonic()

    def step(self) -> events.OrphansGone | events.OrphansStuck | None:
        """Do one round of asking or killing; give the event that follows from it."""
        self.deadline = None
        keepers = self._keepers()
        if not self._is_waited_for:
            return None
        if set(procfs.children(os.getpid())) <= keepers:
            self._is_waited_for = False
            self._kill_limit = None
            return events.OrphansGone()
        if self._kill_limit is None:
            sweep.ask_tops(self._asked, keepers)
            return None
        self._sweeper.sweep(keepers)
        return self._after_sweep(keepers, self._kill_limit)

    def _after_sweep(self, keepers: frozenset[int], kill_limit: float) -> events.OrphansStuck | None:
        now = time.monotonic()
        self.deadline = now + self._pause_s
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
        left = sweep.survivors(keepers) if now >= kill_limit else []
        if not left:
            return None
        self._kill_limit = now + KILL_LIMIT_S
        return events.OrphansStuck(left)
