"""What projects do today, written fresh: wait until the sum over devices is back near the smallest baseline.

As vLLM's test harness does it: 2 GiB of headroom, looked at each second; other tenants count.
"""

from __future__ import annotations

import threading
import time

import pynvml

HEADROOM_BYTES = 2 << 30
PERIOD_S = 1.0


def total_bytes() -> int:
    """Give what is in use on all devices."""
    handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
    return sum(pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used for handle in handles)


class Polling(threading.Thread):
    """Waits from its start on; `freed_at` is its answer, None if it gave up after the limit: it reports a leak."""

    def __init__(self, baseline_bytes: int, limit_s: float = 5.0) -> None:
        super().__init__(daemon=True)
        self._baseline_bytes = baseline_bytes
        self._limit_s = limit_s
        self.freed_at: float | None = None

    def run(self) -> None:
        deadline = time.monotonic() + self._limit_s
        while time.monotonic() < deadline:
            if total_bytes() <= self._baseline_bytes + HEADROOM_BYTES:
                self.freed_at = time.monotonic()
                return
            time.sleep(PERIOD_S)
