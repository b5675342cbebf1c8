"""What dead runs have left behind: finds it by the ledger, and ends it.

Only servers whose watchdog and keeper have both died are looked at. A process is one of theirs if it bears a mark that
no other process can have: it is in the server's cgroup, it was seen in its tree, it has the server's mark in its
environment, it holds the server's log open for writing, it shares the root's session with such a one, or it descends
from such a one. Whoever is found is stopped first, until a look finds nobody new, so that nobody can fork and vanish
between two looks; then all are killed. Several processes may do this at the same time.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from harness import procfs, runs
from harness.entries import Entry, Identity, Unreadable, read
from harness.watchdog import cgroups, ledger

if TYPE_CHECKING:
    from collections.abc import Iterable

_MOST_LOOKS = 50
_PAUSE_S = 0.002
_WRITABLE = 3  # O_ACCMODE: O_WRONLY or O_RDWR are among these bits, O_RDONLY is 0


@dataclass(frozen=True)
class Remains:
    """What there is in a state directory: entries of dead runs, with who is left of each, and what cannot be read."""

    entries: dict[Path, Entry] = field(default_factory=dict)
    processes: dict[Path, list[procfs.Stat]] = field(default_factory=dict)
    unreadable: dict[Path, str] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Say whether no process is left and everything could be read."""
        return not (any(self.processes.values()) or self.unreadable)


def find(directory: Path) -> Remains:
    """Look for what dead runs have left; nothing is changed."""
    found = Remains()
    for path in runs.entries(directory):
        if runs.is_held(path):
            continue
        try:
            entry = read(path)
        except Unreadable as error:
            found.unreadable[path] = str(error)
            continue
        if entry is not None and _is_dead(entry):
            found.entries[path] = entry
            found.processes[path] = []
    for stat, entry in look(found.entries.values()):
        found.processes[entry.path].append(stat)
    return found


def _is_dead(entry: Entry) -> bool:
    if entry.boot != ledger.boot():
        return True  # and so is every process of it
    if entry.namespace != ledger.namespace():
        return False  # its pids mean nothing here
    keepers = [entry.watchdog] if entry.keeper is None else [entry.watchdog, entry.keeper]
    return not any(procfs.is_alive(*who) for who in keepers)


def look(entries: Iterable[Entry]) -> list[tuple[procfs.Stat, Entry]]:
    """Find every living process of these servers, apart from this one and its ancestors."""
    here = [entry for entry in entries if entry.boot == ledger.boot()]
    if not here:
        return []
    spared = _own_line()
    stats = [stat for name in os.listdir("/proc") if name.isdigit() and (stat := procfs.stat(int(name))) is not None]
    alive = {stat.pid: stat for stat in stats if stat.state not in "ZX" and stat.pid not in spared}
    evidence = _Evidence(here)
    owners = {pid: entry for pid, stat in alive.items() if (entry := evidence.owner(stat)) is not None}
    _add_sessions(owners, alive, here)
    _add_descendants(owners, alive)
    return [(alive[pid], entry) for pid, entry in owners.items()]


def _own_line() -> set[int]:
    line = {0, 1}
    pid = os.getpid()
    while pid not in line:
        line.add(pid)
        found = procfs.stat(pid)
        pid = found.parent if found is not None else 0
    return line


def _add_sessions(owners: dict[int, Entry], alive: dict[int, procfs.Stat], entries: list[Entry]) -> None:
    # A session's number is free once its last member has ended, and a daemon that has nothing to do with us may get it.
    # So it says something only while one who is known to be ours is in it: the root, or one that bears another mark.
    roots = {entry.root.pid: entry for entry in entries if entry.root is not None}
    known = {alive[pid].session: entry for pid, entry in owners.items()}
    sessions = {session: entry for session, entry in known.items() if roots.get(session) is entry}
    for stat in alive.values():
        if stat.session in sessions:
            owners.setdefault(stat.pid, sessions[stat.session])


def _add_descendants(owners: dict[int, Entry], alive: dict[int, procfs.Stat]) -> None:
    children: dict[int, list[procfs.Stat]] = {}
    for stat in alive.values():
        children.setdefault(stat.parent, []).append(stat)
    queue = list(owners)
    while queue:
        parent = alive[queue.pop()]
        for child in children.get(parent.pid, []):
            # A child that is older than its parent had another one, whose number was given away.
            if child.pid not in owners and child.start_time >= parent.start_time:
                owners[child.pid] = owners[parent.pid]
                queue.append(child.pid)


class _Evidence:
    """The marks of some servers, and whom they belong to."""

    def __init__(self, entries: list[Entry]) -> None:
        self._members = {who: entry for entry in entries for who in entry.members | {entry.root} if who is not None}
        self._marks = {f"{ledger.MARK}={entry.mark}".encode(): entry for entry in entries}
        self._logs = {os.path.basename(entry.log) for entry in entries if entry.file is not None}
        self._files = {entry.file: entry for entry in entries if entry.file is not None}
        self._cgroups = {pid: entry for entry in entries if is_there(entry) for pid in cgroups.members(entry.cgroup)}
        self._since = min(entry.watchdog.start_time for entry in entries)

    def owner(self, stat: procfs.Stat) -> Entry | None:
        """Say which server this process belongs to, by what it bears itself."""
        if stat.start_time < self._since:
            return None
        found = (
            self._members.get(Identity(stat.pid, stat.start_time))
            or self._cgroups.get(stat.pid)
            or self._by_environment(stat.pid)
            or self._by_log(stat.pid)
        )
        again = procfs.stat(stat.pid) if found is not None else None
        is_same = again is not None and again.start_time == stat.start_time  # all that was read was its own
        return found if is_same and found is not None and stat.start_time >= found.watchdog.start_time else None

    def _by_environment(self, pid: int) -> Entry | None:
        with contextlib.suppress(OSError):
            for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if variable in self._marks:
                    return self._marks[variable]
        return None

    def _by_log(self, pid: int) -> Entry | None:
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    # Its name first: to ask for the file itself may block, where its file system hangs.
                    target = os.readlink(f"/proc/{pid}/fd/{name}").removesuffix(" (deleted)")
                    if os.path.basename(target) in self._logs and _is_writable(pid, name):
                        found = os.stat(f"/proc/{pid}/fd/{name}")
                        entry = self._files.get((found.st_dev, found.st_ino))
                        # The inode of a log that was removed may be another file's by now.
                        if entry is not None and os.path.basename(target) == os.path.basename(entry.log):
                            return entry
        return None


def _is_writable(pid: int, descriptor: str) -> bool:
    lines = Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text(encoding="ascii", errors="replace").splitlines()
    flags = next((line.split()[1] for line in lines if line.startswith("flags:")), "0")
    return bool(int(flags, 8) & _WRITABLE)


def is_there(entry: Entry) -> bool:
    """Say whether the entry's cgroup exists, and is the one that was made for it."""
    try:
        return bool(entry.cgroup) and entry.boot == ledger.boot() and os.stat(entry.cgroup).st_ino == entry.cgroup_inode
    except OSError:
        return False


def end(directory: Path, *, limit_s: float) -> Remains:
    """End what dead runs have left, in about `limit_s` seconds, and remove their entries; give what is left."""
    found = find(directory)
    deadline = time.monotonic() + limit_s
    if any(found.processes.values()):
        with _Hold() as hold:
            _stop_all(hold, found, deadline)
            _kill_all(hold, found, deadline)
    left: dict[Path, list[procfs.Stat]] = {}
    for stat, entry in look(found.entries.values()):
        left.setdefault(entry.path, []).append(stat)
    for path, entry in found.entries.items():
        if path not in left:
            _remove(entry)
    return Remains({path: found.entries[path] for path in left}, left, found.unreadable)


def _stop_all(hold: _Hold, found: Remains, deadline: float) -> None:
    for _ in range(_MOST_LOOKS):
        _strike_marked(hold, found, signal.SIGSTOP)
        seen = [stat for stat, _ in look(found.entries.values())]
        fresh = [stat for stat in seen if hold.take(stat)]
        hold.send(signal.SIGSTOP)
        is_settled = not fresh and all(map(hold.has, seen))
        if is_settled or time.monotonic() >= deadline:
            return


def _strike_marked(hold: _Hold, found: Remains, number: int) -> None:
    """Signal who bears a mark at once, the newest first: one that hops on by forking is not there any more later."""
    entries = [entry for entry in found.entries.values() if entry.boot == ledger.boot()]
    evidence, spared = _Evidence(entries), _own_line()
    for pid in sorted((int(name) for name in os.listdir("/proc") if name.isdigit()), reverse=True):
        stat = procfs.stat(pid) if pid not in spared else None
        if stat is not None and stat.state not in "ZX" and evidence.owner(stat) is not None and hold.take(stat):
            hold.send_one(stat, number)


def _kill_all(hold: _Hold, found: Remains, deadline: float) -> None:
    for entry in found.entries.values():
        if is_there(entry) and _own_line().isdisjoint(cgroups.members(entry.cgroup)):
            cgroups.kill(entry.cgroup)
    while True:
        hold.send(signal.SIGKILL)
        hold.wait(min(deadline, time.monotonic() + 1.0))
        left = [stat for stat, _ in look(found.entries.values())]
        if not left or time.monotonic() >= deadline:
            return
        for stat in left:
            hold.take(stat)
        _strike_marked(hold, found, signal.SIGKILL)
        time.sleep(_PAUSE_S)


def _remove(entry: Entry) -> None:
    if is_there(entry):
        cgroups.remove(entry.cgroup)
        cgroups.remove_empty(os.path.dirname(entry.cgroup))
    entry.path.unlink(missing_ok=True)


class _Hold:
    """Processes that are held by a pidfd each, so that no signal can reach another."""

    def __init__(self) -> None:
        self._pidfds: dict[Identity, int] = {}

    def __enter__(self) -> _Hold:  # noqa: PYI034 - typing.Self is there from Python 3.11 on
        return self

    def __exit__(self, *_error: object) -> None:
        for descriptor in self._pidfds.values():
            os.close(descriptor)

    def take(self, stat: procfs.Stat) -> bool:
        """Hold a process; False if it is held already, has gone, or cannot be."""
        who = Identity(stat.pid, stat.start_time)
        if who in self._pidfds:
            return False
        try:
            descriptor = os.pidfd_open(stat.pid)
        except OSError:
            return False
        if not procfs.is_alive(*who):
            os.close(descriptor)
            return False
        self._pidfds[who] = descriptor
        return True

    def has(self, stat: procfs.Stat) -> bool:
        """Say whether a process is held."""
        return Identity(stat.pid, stat.start_time) in self._pidfds

    def send_one(self, stat: procfs.Stat, number: int) -> None:
        """Send a signal to one that is held."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            signal.pidfd_send_signal(self._pidfds[Identity(stat.pid, stat.start_time)], number)

    def send(self, number: int) -> None:
        """Send a signal to all that are held."""
        for descriptor in self._pidfds.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(descriptor, number)

    def wait(self, deadline: float) -> None:
        """Wait until all have exited, or until the deadline."""
        for who, descriptor in list(self._pidfds.items()):
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            if poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                os.close(self._pidfds.pop(who))
