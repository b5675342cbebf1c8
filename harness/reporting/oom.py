"""Whether the kernel's out-of-memory killer ended a server: what the kernel log and its counters say."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from harness import procfs

_CGROUPS = Path("/sys/fs/cgroup")
# PROC_PID_INIT_INO (include/linux/proc_ns.h): elsewhere the kernel log speaks of other pids than we do.
_FIRST_NAMESPACE = "pid:[4026531836]"
_MOST_MESSAGES = 100_000
_MESSAGE_BYTES = 8192


def counters() -> dict[str, int]:
    """Give how many processes the out-of-memory killer has ended: in this process's cgroup, and on this machine.

    memory.events is that of the cgroup and all below it (Linux 4.19), memory.oom_control its forerunner in version 1,
    /proc/vmstat that of the machine (Linux 4.13). What cannot be read is left out.
    """
    found: dict[str, int] = {}
    for where, find in (("this cgroup", _of_cgroup), ("this machine", lambda: Path("/proc/vmstat"))):
        with contextlib.suppress(OSError, ValueError, IndexError):
            path = find()
            lines = procfs.read(str(path)).decode().splitlines() if path is not None else []
            found.update((where, int(line.split()[1])) for line in lines if line.startswith("oom_kill "))
    return found


def _of_cgroup() -> Path | None:
    for line in os.fsdecode(procfs.read("/proc/self/cgroup")).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            candidates = [_CGROUPS / path.lstrip("/") / "memory.events", _CGROUPS / "memory.events"]
        elif "memory" in controllers.split(","):
            above = _CGROUPS / "memory"
            candidates = [above / path.lstrip("/") / "memory.oom_control", above / "memory.oom_control"]
        else:
            continue
        for candidate in candidates:
            if candidate.exists():
                return candidate
    return None


def evidence(pid: int, since: float, before: dict[str, int]) -> str:
    """Say in words what speaks for it that a server was ended so, "" if nothing does.

    `since` is its launch (`time.monotonic()`), `before` the counters then; `pid` is its root's.
    """
    message = _message(pid, since)
    if message:
        return f"ended by the kernel's out-of-memory killer: {message}"
    now = counters()
    for where, count in before.items():
        more = now.get(where, 0) - count
        if more > 0:
            return f"the kernel's out-of-memory killer ended {more} process{'es' * (more > 1)} of {where} while it ran"
    return ""


def _message(pid: int, since: float) -> str:
    with contextlib.suppress(OSError):
        if os.readlink("/proc/self/ns/pid") != _FIRST_NAMESPACE:
            return ""
        # Each read(2) of /dev/kmsg gives one record, EPIPE if it was overwritten meanwhile, EAGAIN at the end.
        descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return _find(descriptor, pid, since)
        finally:
            os.close(descriptor)
    return ""


def _find(descriptor: int, pid: int, since: float) -> str:
    pattern = re.compile(rf"[Oo]ut of memory.*[Kk]illed process {pid} \(")
    for _ in range(_MOST_MESSAGES):
        try:
            head, _, text = os.read(descriptor, _MESSAGE_BYTES).decode(errors="replace").partition(";")
        except BrokenPipeError:
            continue
        except BlockingIOError:
            return ""
        # "6,339,5140900,-": level, number, microseconds of about CLOCK_MONOTONIC.
        if pattern.search(text) and int(head.split(",")[2]) / 1e6 >= since - 1.0:
            return text.splitlines()[0]
    return ""
