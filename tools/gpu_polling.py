"""What projects do today, written fresh: wait until the sum over devices is back near the smallest baseline.

As vLLM's test harness does it: 2 GiB of headroom, looked at each second; other tenants count.
"""

from __future__ import annotations

import os
import select
import threading
import time
from typing import TYPE_CHECKING

import pynvml

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADROOM_BYTES = 2 << 30
PERIOD_S = 1.0
_LONGEST_EXIT_S = 60.0


def total_bytes() -> int:
    """Give what is in use on all devices."""
    handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
    return sum(pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used for handle in handles)


class Polling(threading.Thread):
    """Waits, `limit_s` at most: `freed_at` is its answer, None if it gave up at `ended_at`: it reports a leak.

    It begins once the processes `roots` have ended, as vLLM does, and `delay_s` later.
    """

    def __init__(
        self, baseline_bytes: int, *, roots: Sequence[int] = (), delay_s: float = 0.0, limit_s: float = 5.0
    ) -> None:
        super().__init__(daemon=True)
        self._baseline_bytes = baseline_bytes
        self._pidfds = [os.pidfd_open(root) for root in roots]
        self._delay_s = delay_s
        self._limit_s = limit_s
        self.freed_at: float | None = None
        self.ended_at = float("inf")

    def run(self) -> None:
        for pidfd in self._pidfds:
            select.select([pidfd], [], [], _LONGEST_EXIT_S)
            os.close(pidfd)
        time.sleep(self._delay_s)
        deadline = time.monotonic() + self._limit_s
        while self.freed_at is None and time.monotonic() < deadline:
            if total_bytes() <= self._baseline_bytes + HEADROOM_BYTES:
                self.freed_at = time.monotonic()
            else:
                time.sleep(PERIOD_S)
        self.ended_at = time.monotonic()

    @property
    def answer(self) -> str:
        """Give what it says: "freed" or "held"."""
        return "held" if self.freed_at is None else "freed"
