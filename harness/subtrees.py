"""Killing a process of this one's with all that it has started, but for what the harness itself needs.

For processes that no watchdog owns, and for parts of a server's tree: best effort, as for adopted servers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from harness import forking, procfs
from harness.errors import HarnessError, SpecError
from harness.reporting import following

# Only another round finds what was forked since the last one.
_ROUND_S = 0.005


def others_of_this_process() -> list[int]:
    """Give the children of this process that are neither a watchdog nor a follower of logs."""
    return [pid for pid in procfs.children(os.getpid()) if pid not in _own()]


def kill(pid: int, *, include_root: bool = True, skip: int | None = None, wait_s: float | None = None) -> None:
    """Kill a descendant of this process with its own descendants, all but `skip`; one that is not there is fine.

    Waits `wait_s` seconds for their ends, None not at all. Raises SpecError for a process that this one has not
    started, or that belongs to the harness; HarnessError for what is still there then.
    """
    if not _is_there(pid):
        return
    _check(pid)
    deadline = time.monotonic() + (wait_s or 0.0)
    struck: dict[int, int] = {}
    while True:
        # Children first: when their parent has gone they are not found any more.
        members = [*reversed(procfs.descendants(pid)), *([pid] if include_root else [])]
        for member in members:
            if member != skip and member not in struck and (found := procfs.stat(member)) is not None:
                struck[member] = found.start_time
        left = [member for member, start_time in struck.items() if _strike(member, start_time)]
        if not left or wait_s is None:
            return
        if time.monotonic() >= deadline:
            raise HarnessError(f"still there {wait_s:g} s after SIGKILL: pid {', '.join(map(str, sorted(left)))}")
        time.sleep(_ROUND_S)


def _own() -> set[int]:
    return {*forking.pids(), *following.pids()}


def _check(pid: int) -> None:
    own = _own()
    below = {child for watchdog in own for child in procfs.children(watchdog)}  # keepers, and what reads GPUs
    if pid in own | below:
        raise SpecError(f"process {pid} is the harness's own: it ends by itself")
    if pid not in procfs.descendants(os.getpid()) and _is_there(pid):
        raise SpecError(f"process {pid} was not started by this process, nor by a server of it: it is left alone")


def _is_there(pid: int) -> bool:
    found = procfs.stat(pid)
    return found is not None and found.state not in "ZX"


def _strike(pid: int, start_time: int) -> bool:
    """Send SIGKILL to exactly this process, through a pidfd; say whether it was there."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if not procfs.is_alive(pid, start_time):
            return False
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        return True
    finally:
        os.close(descriptor)
