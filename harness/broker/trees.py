"""Which of the processes that a device lists belong to a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness import procfs

if TYPE_CHECKING:
    from collections.abc import Iterable

_DEEPEST = 256


class Tree:
    """The processes below one keeper, as far as they have been seen on a device."""

    def __init__(self, keeper: int) -> None:
        """Take the keeper, which is the subreaper of all of them."""
        self._keeper = keeper
        self._known: dict[tuple[int, int], bool] = {}
        self.own: dict[int, int] = {}  # by pid, the start time

    def add(self, pid: int, start_time: int) -> None:
        """Take a process that is known to be the server's, whether a device has listed it or not."""
        self.own[pid] = start_time
        self._known[pid, start_time] = True

    def look(self, pids: Iterable[int]) -> bool:
        """Look at processes that a device lists; say whether one of the server's is new."""
        fresh = False
        for pid in pids:
            found = procfs.stat(pid)
            if found is None or (pid, found.start_time) in self._known:
                continue
            is_own = self._descends(found)
            if is_own is None:
                continue  # it is looked at again
            self._known[pid, found.start_time] = is_own
            if is_own:
                self.own[pid] = found.start_time
                fresh = True
        return fresh

    def _descends(self, found: procfs.Stat) -> bool | None:
        """Say whether it descends from the keeper; None if a parent has ended meanwhile, so that it has another now."""
        for _ in range(_DEEPEST):
            if found.parent == self._keeper:
                return True
            if not found.parent:
                return False
            parent = procfs.stat(found.parent)
            if parent is None:
                return None
            found = parent
        return False

    def listed(self, pids: Iterable[int]) -> set[int]:
        """Give those that are the server's: a number that another process has now is not."""
        found = set()
        for pid in pids:
            if pid in self.own:
                stat = procfs.stat(pid)
                if stat is None or stat.start_time == self.own[pid]:
                    found.add(pid)
        return found
