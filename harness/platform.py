"""Whether this platform has what the watchdog needs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from harness.errors import PlatformNotSupported


def check() -> None:
    """Raise PlatformNotSupported, naming what is missing: Linux 5.4 with pidfds and /proc/PID/task/TID/children."""
    if sys.platform != "linux":
        raise PlatformNotSupported(f"the watchdog needs Linux (pidfds, subreapers, /proc); this is {sys.platform}")
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError) as error:
        raise PlatformNotSupported(f"the watchdog needs pidfd_open(2), which fails here: {error}") from None
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        raise PlatformNotSupported("the watchdog needs /proc/PID/task/TID/children (CONFIG_PROC_CHILDREN)")
    if not sys.executable:
        raise PlatformNotSupported("the watchdog needs sys.executable, which is empty: an embedded interpreter?")
