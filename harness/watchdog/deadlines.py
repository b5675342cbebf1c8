"""Many deadlines, of which only the earliest is asked for: pure.

Each event asks for it, so a look at every server would make an event cost as much as there are servers.
"""

from __future__ import annotations

from heapq import heappop, heappush


class Deadlines:
    """At most one deadline, in seconds of the monotonic clock, for each key."""

    def __init__(self) -> None:
        """Begin with none."""
        self._at: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []  # all of `_at`, and some that have been changed since

    def of(self, key: int) -> float | None:
        """Give a key's deadline."""
        return self._at.get(key)

    def set(self, key: int, deadline: float | None) -> None:
        """Set a key's deadline, or take it away."""
        if deadline is None:
            self._at.pop(key, None)
        elif self._at.get(key) != deadline:
            self._at[key] = deadline
            heappush(self._heap, (deadline, key))

    def next(self) -> float | None:
        """Give the earliest deadline."""
        while self._heap and self._at.get(self._heap[0][1]) != self._heap[0][0]:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take(self, now: float) -> list[int]:
        """Take away the deadlines that have passed, and give their keys in order."""
        due: list[int] = []
        while (deadline := self.next()) is not None and deadline <= now:
            key = heappop(self._heap)[1]
            del self._at[key]
            due.append(key)
        return sorted(due)
