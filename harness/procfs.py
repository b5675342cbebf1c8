"""What /proc says of processes: trees, identity, state. Used by both sides; reads only.

A pid is a promise of nothing: a process is known by (pid, start time), where the start time is field 22 of
/proc/PID/stat (clock ticks since boot, proc(5)).
"""

from __future__ import annotations

import os
import time

from harness.records import Record

_PF_FORKNOEXEC = 0x40


class Stat(Record):
    """Some fields of /proc/PID/stat."""

    pid: int
    state: str
    parent: int
    process_group: int
    session: int
    start_time: int


def stat(pid: int) -> Stat | None:
    """Read a process's stat; None if there is no such process."""
    fields = stat_fields(pid)
    if not fields:
        return None
    return Stat(pid, fields[0].decode(), int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))


def stat_fields(pid: int) -> list[bytes]:
    """Give the fields of /proc/PID/stat from the state on; none if there is no such process."""
    text = read(f"/proc/{pid}/stat")
    # The command name is in parentheses, and may itself hold spaces and parentheses.
    return text[text.rindex(b")") + 2 :].split() if text else []


def status(pid: int) -> dict[str, str]:
    """Give the lines of /proc/PID/status by their names; empty if there is no such process."""
    lines = read(f"/proc/{pid}/status").decode(errors="replace").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def age_s(found: Stat) -> float:
    """Give for how many seconds a process has been there, to a clock tick (0.01 s)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - found.start_time / os.sysconf("SC_CLK_TCK")


def has_executed(pid: int) -> bool:
    """Say whether a process, which may be a zombie, has executed a program since it was forked.

    Source: PF_FORKNOEXEC in field 9 of /proc/PID/stat; execve clears it before it closes descriptors (Linux 5.4, 6.18).
    """
    fields = stat_fields(pid)
    return not (fields and int(fields[6]) & _PF_FORKNOEXEC)


def is_alive(pid: int, start_time: int) -> bool:
    """Say whether exactly this process exists and is no zombie."""
    found = stat(pid)
    return found is not None and found.start_time == start_time and found.state not in "ZX"


def may_be_alive(pid: int, start_time: int) -> bool | None:
    """Say whether exactly this process exists and is no zombie; None if /proc hides others' (hidepid=, proc(5))."""
    if stat(pid) is None:
        try:
            os.kill(pid, 0)
        except PermissionError:
            return None
        except ProcessLookupError:
            return False
    return is_alive(pid, start_time)


def children(pid: int) -> list[int]:
    """Give the children of all threads of a process; processes that are forked meanwhile may be missed.

    Source: /proc/PID/task/TID/children, proc(5), since Linux 3.5 with CONFIG_PROC_CHILDREN.
    """
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for thread in threads:
        found += map(int, read(f"/proc/{pid}/task/{thread}/children").split())
    return found


def own_children() -> list[int]:
    """Give the children of the calling thread, which in a keeper is the whole process, by one read (Linux 3.17)."""
    return [*map(int, read("/proc/thread-self/children").split())]


def descendants(pid: int) -> list[int]:
    """Give the children of a process, their children and so on; each before its own children."""
    found: list[int] = []
    seen = {pid}
    queue = [pid]
    while queue:
        fresh = [child for child in children(queue.pop(0)) if child not in seen]
        seen.update(fresh)
        found += fresh
        queue += fresh
    return found


def command_line(pid: int) -> str:
    """Give the command line as text, or "" if it has none (a zombie or a kernel thread)."""
    return read(f"/proc/{pid}/cmdline").rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")


def name(pid: int) -> str:
    """Give the name that `ps -o comm` shows, "" for nobody."""
    return read(f"/proc/{pid}/comm").decode(errors="replace").rstrip("\n")


def wait_channel(pid: int) -> str:
    """Give the kernel function in which the process sleeps, or "" if it is not known."""
    return read(f"/proc/{pid}/wchan").decode(errors="replace").strip("0")


def read(path: str) -> bytes:
    """Read a file of the kernel's; empty if that cannot be done. What interrupts it leaves no file object behind."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        parts = []
        while part := os.read(descriptor, 65536):
            parts.append(part)
    except OSError:
        return b""
    else:
        return b"".join(parts)
    finally:
        os.close(descriptor)
