"""Finds and kills every process below this one, without ever hitting a process that is not its own.

Runs in a keeper, and in the watchdog for what a lost keeper left. A direct child cannot be recycled before this process
reaps it, and neither can its process group's number, so both are killed by number. A process further down is killed
through a pidfd, and only if after opening it the number still belongs to a child of the parent it was found under.
"""

from __future__ import annotations

import os
import signal

from harness import procfs
from harness.messages import Survivor
from harness.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


# A keeper's report is one message of at most 64 KiB: a longer one would be cut or refused, and nothing reported.
MOST_NAMED = 50


class Round(Record):
    """What one sweep met."""

    is_new: bool
    alive: list[int]


class Sweeper:
    """Sends SIGKILL, round after round, to whatever is below this process, apart from some spared children."""

    def __init__(self) -> None:
        """Begin with nothing struck."""
        self._struck: set[int] = set()
        self._has_begun = False

    def kill_top(self) -> None:
        """Strike the children of this process and their groups, without a look at what is below them."""
        self._struck.update(_strike_top(frozenset()))
        self._has_begun = True

    def has_new_top(self) -> bool:
        """Say whether there is a child that has not been struck, once `kill_top` has begun to strike."""
        return self._has_begun and not self._struck.issuperset(procfs.own_children())

    def sweep(self, spared: frozenset[int] = frozenset()) -> Round:
        """Do one round; the caller reaps and sweeps again until nothing is left (new ones are forked meanwhile)."""
        if self._struck:
            # Where others fork on and on a slice of CPU time that begins now is long enough to list and to strike them.
            os.sched_yield()
        tops = _strike_top(spared)
        found = [stat for stat in map(procfs.stat, tops) if stat is not None]
        alive = [stat.pid for stat in found if stat.state not in "ZX"]
        while found:
            parent = found.pop()
            below = [stat for pid in procfs.children(parent.pid) if (stat := _strike(pid, parent)) is not None]
            alive += [stat.pid for stat in below if stat.state not in "ZX"]
            found += below
        is_new = not self._struck.issuperset(alive)
        self._struck.update(tops, alive)
        return Round(is_new, alive)

    def forget(self, pids: list[int]) -> None:
        """Forget processes that have been reaped: their numbers may come back."""
        self._struck.difference_update(pids)


def ask_tops(asked: set[int], spared: frozenset[int] = frozenset()) -> None:
    """Send SIGTERM to each direct child that has not been asked yet, and add it to `asked`."""
    for pid in procfs.children(os.getpid()):
        if pid not in asked and pid not in spared:
            asked.add(pid)
            _send(os.kill, pid, signal.SIGTERM)


def survivors(spared: frozenset[int] = frozenset()) -> list[Survivor]:
    """Describe the processes that are alive below this one, but no more than 50 of them."""
    tops = [pid for pid in procfs.children(os.getpid()) if pid not in spared]
    pids = tops + [below for top in tops for below in procfs.descendants(top)]
    found = [stat for stat in map(procfs.stat, pids) if stat is not None and stat.state != "Z"]
    found = found[:MOST_NAMED]
    return [Survivor(s.pid, s.state, procfs.wait_channel(s.pid), procfs.command_line(s.pid)[:200]) for s in found]


def _strike_top(spared: frozenset[int]) -> list[int]:
    # The youngest first, and without a look at them: those that fork on and on are listed last, behind their zombies.
    tops = [pid for pid in reversed(procfs.own_children()) if pid not in spared]
    for pid in tops:
        _send(os.kill, pid)
    _strike_groups(tops)
    return tops


def _strike_groups(children: list[int]) -> None:
    for group in {_group_of(child) for child in children} - {None, os.getpgid(0)}:
        _send(os.killpg, group or 0)


def _group_of(child: int) -> int | None:
    try:
        return os.getpgid(child)
    except ProcessLookupError:
        return None


def _strike(pid: int, parent: procfs.Stat) -> procfs.Stat | None:
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        found = procfs.stat(pid)
        again = procfs.stat(parent.pid)
        # A parent further down may have been reaped, and its number given to a process with children of its own.
        if found is None or found.parent != parent.pid or again is None or again.start_time != parent.start_time:
            return None
        _send(signal.pidfd_send_signal, descriptor)
    finally:
        os.close(descriptor)
    return found


def _send(send: Callable[[int, int], None], target: int, number: int = signal.SIGKILL) -> None:
    try:
        send(target, number)
    except (ProcessLookupError, PermissionError):
        return  # gone already, or another user's (a set-user-ID program): it is reported as alive
