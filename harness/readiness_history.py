"""What was seen of a server while it was waited for, and when. Pure but for the clock."""

from __future__ import annotations

import time

# A check of the user's, or a server that answers something else each time, must not fill the memory.
_MOST = 100


class ReadinessHistory:
    """What the readiness check of one server has seen, each change once, with the seconds since its launch."""

    def __init__(self, launched_at: float) -> None:
        """Take the moment of the launch (`time.monotonic()`)."""
        self._launched_at = launched_at
        self.seen: list[tuple[float, str]] = []
        self.is_ready = False
        self.is_awaited = False
        self.limit_s = 0.0

    def begin(self, is_checked: bool, limit_s: float) -> None:  # noqa: FBT001 - it has one caller
        """Say that somebody waits, at most `limit_s`; without a check the server is ready when it is alive."""
        self.is_awaited = self.is_awaited or is_checked
        self.limit_s = limit_s

    def see(self, text: str) -> None:
        """Take what was seen just now; what was seen before as well is not kept again."""
        if not self.seen or self.seen[-1][1] != text:
            if len(self.seen) >= _MOST:
                del self.seen[_MOST // 2]
            self.seen.append((time.monotonic() - self._launched_at, text))

    def end(self, text: str) -> bool:
        """Take how the wait has ended ("ready", or why not); say whether the server has become ready by it."""
        was_ready = self.is_ready
        self.is_ready = text == "ready"
        if not (was_ready and self.is_ready):
            self.see(text)
        return self.is_ready and not was_ready
