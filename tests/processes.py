"""What tests ask about processes: who they are, that they have ended, what is left. Reads /proc without the harness.

A process that has ended counts as gone although its parent has not reaped it; `zombies` finds those.
"""

from __future__ import annotations

import os
import select
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_POLL_S = 0.005


class Identity(NamedTuple):
    """One process for all time: its pid and its start time (field 22 of /proc/PID/stat, proc(5))."""

    pid: int
    start_time: int


def _fields(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes().decode(errors="replace")
    except OSError:
        return []
    return text[text.rindex(")") + 2 :].split()


def identify(pid: int) -> Identity | None:
    """Say who has this pid now; None for nobody."""
    fields = _fields(pid)
    return Identity(pid, int(fields[19])) if fields else None


def identities(pids: Iterable[int]) -> list[Identity]:
    """Say who has these pids now."""
    return [who for who in map(identify, pids) if who is not None]


def is_running(who: Identity) -> bool:
    """Say whether exactly this process exists and has not ended."""
    return identify(who.pid) == who and _fields(who.pid)[:1] not in ([], ["Z"], ["X"])


def parent(pid: int) -> int:
    """Give the parent's pid."""
    return int(_fields(pid)[1])


def group(pid: int) -> int:
    """Give the process group."""
    return int(_fields(pid)[2])


def name(pid: int) -> str:
    """Give the name that `ps -o comm` shows, "" for nobody."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").rstrip("\n")
    except OSError:
        return ""


def everybody() -> list[int]:
    """Give every pid of this PID namespace."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def tree(root: int) -> list[int]:
    """Give all descendants of a process, zombies included, found by looking at every process's parent."""
    parents = {pid: int(fields[1]) for pid in everybody() if (fields := _fields(pid))}
    found: list[int] = []
    level = [root]
    while level:
        level = [pid for pid, its_parent in parents.items() if its_parent in level]
        found += level
    return found


def zombies(root: int) -> list[int]:
    """Give the descendants that have ended and were not reaped."""
    return [pid for pid in tree(root) if _fields(pid)[:1] == ["Z"]]


def marked(marker: str) -> list[int]:
    """Give every process that was executed with this text in its environment, wherever it hangs in the tree."""
    found = []
    for pid in everybody():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if marker.encode() in environment and pid != os.getpid():
            found.append(pid)
    return found


def descriptors() -> dict[str, str]:
    """Give this process's open file descriptors, and what each one is."""
    targets = {number: _target(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
    return {number: target for number, target in targets.items() if target}  # the one that listed them is gone


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def left_after(wanted: Iterable[Identity], timeout_s: float) -> list[Identity]:
    """Wait for processes to end, by pidfd; give those that had not after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    poll = select.poll()
    watched: dict[int, Identity] = {}
    try:
        for who in wanted:
            try:
                descriptor = os.pidfd_open(who.pid)
            except OSError:
                continue
            watched[descriptor] = who
            if is_running(who):
                poll.register(descriptor, select.POLLIN)
        left = {descriptor for descriptor, who in watched.items() if is_running(who)}
        while left and (remaining := deadline - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(remaining * 1000):
                poll.unregister(descriptor)
                left.discard(descriptor)
        return [watched[descriptor] for descriptor in left]
    finally:
        for descriptor in watched:
            os.close(descriptor)


def wait_gone(wanted: Iterable[int | Identity], timeout_s: float) -> None:
    """Wait for processes to end; raises AssertionError that describes those that have not after `timeout_s`."""
    people = [who if isinstance(who, Identity) else identify(who) for who in wanted]
    left = left_after([who for who in people if who is not None], timeout_s)
    assert not left, f"still there after {timeout_s} s: {describe(who.pid for who in left)}"


def describe(pids: Iterable[int]) -> list[str]:
    """Describe processes for an error."""
    return [f"{pid} {name(pid)!r} state {(_fields(pid) or '?')[0]} parent {(_fields(pid) or '??')[1]}" for pid in pids]


# Signals 32 and 33 are glibc's own: its posix_spawn, which Python 3.13 uses for subprocesses, leaves them ignored in
# the test process, and no program can change that.
_OF_GLIBC = 3 << 31


def signal_set(text: str) -> int:
    """Give a set of signals from /proc/PID/status as a number, without those that are glibc's own."""
    return int(text, 16) & ~_OF_GLIBC


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Wait for something that no descriptor tells of; raises AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not after {timeout_s} s: {what}"
        time.sleep(_POLL_S)  # the state is in another process, and nothing announces it
