"""The leases that this broker has been granted, and the servers on them, until the memory of each device is back."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from harness import procfs
from harness.broker import grants, releases
from harness.broker.book import Tenant, Who
from harness.broker.edits import UNUSABLE
from harness.broker.readings import Fault, Reading
from harness.broker.releases import Others, Release
from harness.broker.trees import Tree
from harness.lease_messages import DeviceRelease, GpuProcess, LeaseStatus, Released, TenantRecorded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from harness.broker.book import Book
    from harness.broker.edits import Edits
    from harness.broker.readers import Readers
    from harness.broker.readings import Device, Read
    from harness.lease_messages import Lease, TenantOrder, TenantStarted
    from harness.messages import BrokerReport
    from harness.watchdog.log import Log

_MIB = 1 << 20
# A process that SIGKILL does not end has had its time.
_STUCK_S = 1.0
# Without a test process nobody waits for a verdict: what is not back by then is judged by whoever asks next.
NOBODY_WAITS_S = 5.0
# What a report has room for.
_MOST_PROCESSES = 8
_MOST_CHARACTERS = 160


@dataclass
class _Held:
    """A lease; `is_closed`: nobody is launched on it any more."""

    number: int
    id: str
    devices: list[str]
    release_s: float
    is_closed: bool = False
    quarantined: set[str] = field(default_factory=set)

    @property
    def usable(self) -> list[str]:
        """Give the devices on which servers may still be launched."""
        return [uuid for uuid in self.devices if uuid not in self.quarantined]


@dataclass
class _Tenancy:
    """A server on a lease."""

    order: TenantOrder
    held: _Held
    tree: Tree
    keeper: int | None
    releases: dict[str, Release]
    limit_s: float
    began: float
    is_gone: bool = False
    verdicts: dict[str, str] = field(default_factory=dict)
    leaving: set[str] = field(default_factory=set)
    commands: dict[int, str] = field(default_factory=dict)


class Tenants:
    """All of them."""

    def __init__(
        self, edits: Edits, readers: Readers, me: Who, log: Log, report: Callable[[BrokerReport], None]
    ) -> None:
        """Take the store, the readers, who this process is, and whom to tell."""
        self._edits = edits
        self._readers = readers
        self._me = me
        self._log = log
        self._report = report
        self._held: dict[int, _Held] = {}
        self._tenants: dict[int, _Tenancy] = {}
        self._indexes: dict[str, int] = {}
        self._is_heard = True
        self._sees_pids = False

    def know(self, devices: Iterable[Device]) -> None:
        """Take the devices' numbers, which people know them by."""
        self._indexes = {device.uuid: device.index for device in devices}

    @property
    def is_idle(self) -> bool:
        """Say whether there is no lease and no server."""
        return not self._held and not self._tenants

    def keepers(self) -> dict[int, int]:
        """Give a pidfd of each keeper that may still end, and its server's key."""
        return {
            tenancy.keeper: key
            for key, tenancy in self._tenants.items()
            if tenancy.keeper is not None and not tenancy.is_gone
        }

    def pause_s(self) -> float | None:
        """Give after how long `see_time` has to be called again."""
        return releases.SAMPLE_S if any(tenancy.is_gone for tenancy in self._tenants.values()) else None

    # ---- leases

    def granted(self, number: int, lease_id: str, request: Lease, devices: tuple[str, ...]) -> None:
        """Take a lease that has just been granted."""
        self._held[number] = _Held(number, lease_id, list(devices), request.release_s)
        self._report(LeaseStatus(number, "granted", "", list(devices)))

    def end(self, number: int) -> None:
        """Give a lease back as soon as the memory of its servers is."""
        if number in self._held:
            self._held[number].is_closed = True
            self._settle(self._held[number])

    def client_gone(self) -> None:
        """Give every lease back: nobody is launched any more."""
        for number in list(self._held):
            self.end(number)

    def watchdog_gone(self) -> None:
        """Go on alone: the keepers do what is left, and this process is to end soon after them."""
        self._is_heard = False
        self.client_gone()
        for key, tenancy in list(self._tenants.items()):
            tenancy.limit_s = min(tenancy.limit_s, NOBODY_WAITS_S)
            if tenancy.keeper is None:
                self.keeper_ended(key)

    def _settle(self, held: _Held) -> None:
        if not held.is_closed or any(tenancy.held is held for tenancy in self._tenants.values()):
            return
        self._held.pop(held.number, None)
        devices = tuple(held.devices)
        if devices:
            self._edits.add(lambda book: grants.end(book, held.id, devices))

    # ---- servers

    def add(self, order: TenantOrder) -> None:
        """Write down a server whose keeper waits for that; it is told once the store has it."""
        held = self._held.get(order.lease)
        if held is None or not set(order.devices) <= set(held.usable):
            self._report(Released(order.key, [_unknown(uuid, "it is not on the lease") for uuid in order.devices]))
            return
        book = self._book()
        kept = {uuid: None if book is None else book.baselines.get(uuid) for uuid in order.devices}
        self._tenants[order.key] = _Tenancy(
            order,
            held,
            Tree(order.keeper),
            _pidfd(order.keeper),
            {uuid: Release(None if found is None else found.reading) for uuid, found in kept.items()},
            held.release_s,
            time.monotonic(),
        )
        who = Who(order.keeper, order.start_time, self._me.namespace)
        tenant = Tenant(order.key, order.name, who, tuple(order.devices), ())
        self._edits.add(
            lambda book: grants.add_tenant(book, held.id, tenant), lambda: self._report(TenantRecorded(order.key))
        )
        self._pace(order.devices)

    def started(self, order: TenantStarted) -> None:
        """Take the root of a server."""
        tenancy = self._tenants.get(order.key)
        if tenancy is not None:
            tenancy.tree.add(order.pid, order.start_time)
            tenancy.commands[order.pid] = procfs.command_line(order.pid)[:_MOST_CHARACTERS]
            self._note_pids(tenancy)

    def _note_pids(self, tenancy: _Tenancy) -> None:
        pids = tuple(sorted(tenancy.tree.own.items()))
        lease, key = tenancy.held.id, tenancy.order.key
        self._edits.add(lambda book: grants.note_pids(book, lease, key, pids))

    def asked(self, key: int) -> None:
        """Look closely: the server has begun to end."""
        if key in self._tenants:
            now = time.monotonic()
            for release in self._tenants[key].releases.values():
                release.asked(now)
            self._pace(self._tenants[key].releases)

    def gone(self, key: int, *, is_stuck: bool) -> None:
        """Judge: nothing of the server is left, or SIGKILL does not end it."""
        tenancy = self._tenants.get(key)
        if tenancy is None or tenancy.is_gone:
            return
        tenancy.is_gone = True
        if is_stuck:
            tenancy.limit_s = min(tenancy.limit_s, _STUCK_S)
        now = time.monotonic()
        for uuid, release in tenancy.releases.items():
            release.gone(now)
            self._readers.ask(uuid)
        self._pace(tenancy.releases)

    def keeper_ended(self, key: int) -> None:
        """Take a keeper's end for its server's, where no watchdog is left that would say more."""
        if not self._is_heard:
            self.gone(key, is_stuck=False)

    # ---- readings

    def read(self, read: Read) -> None:
        """Take a reading for all servers on the device."""
        on_it = [tenancy for tenancy in self._tenants.values() if read.uuid in tenancy.releases]
        if not on_it:
            return
        for tenancy in on_it:
            self._attribute(tenancy, read.reading)
        book = self._book()
        listed = (read.reading.processes or {}) if isinstance(read.reading, Reading) else {}
        gone = {pid for pid in listed if procfs.stat(pid) is None}
        for tenancy in on_it:
            release = tenancy.releases[read.uuid]
            release.feed(read, self._others(book, read.uuid, tenancy, gone))
            if tenancy.held.is_closed:
                self._hand_over(tenancy, read.uuid)
        self.see_time()
        self._pace([read.uuid])

    def _book(self) -> Book | None:
        try:
            return self._edits.read()
        except UNUSABLE:
            return None

    def _attribute(self, tenancy: _Tenancy, reading: Reading | Fault) -> None:
        listed = (reading.processes or {}) if isinstance(reading, Reading) else {}
        if tenancy.tree.look(listed):
            self._note_pids(tenancy)
        own = tenancy.tree.listed(listed)
        self._sees_pids = self._sees_pids or bool(own)
        for pid in own - tenancy.commands.keys():
            tenancy.commands[pid] = procfs.command_line(pid)[:_MOST_CHARACTERS]
        for release in tenancy.releases.values():
            release.own |= own
            # A number that somebody else has now.
            release.own -= {pid for pid in release.own & set(listed) if pid not in own}

    def _others(self, book: Book | None, uuid: str, mine: _Tenancy, gone: set[int]) -> Others:
        pids: set[int] = set()
        are_there = False
        for other in self._tenants.values():
            if other is not mine and uuid in other.releases:
                pids |= other.tree.own.keys()
                are_there = True
        for lease in book.leases if book is not None else ():
            if lease.id != mine.held.id and uuid in lease.devices:
                are_there = True
                pids |= {pid for tenant in lease.tenants for pid, _ in tenant.pids}
        return Others(pids, are_there, self._sees_pids, gone)

    def _hand_over(self, tenancy: _Tenancy, uuid: str) -> None:
        # The memory is back, though the tree is still ending: unpinning host memory takes seconds.
        if uuid in tenancy.leaving or uuid not in tenancy.held.usable:
            return
        on_it = [other for other in self._tenants.values() if other.held is tenancy.held and uuid in other.releases]
        if all(other.releases[uuid].is_back_early or uuid in other.verdicts for other in on_it):
            for other in on_it:
                other.leaving.add(uuid)
            lease = tenancy.held.id
            self._edits.add(lambda book: grants.set_leaving(book, lease, uuid))

    def _pace(self, uuids: Iterable[str]) -> None:
        now = time.monotonic()
        for uuid in uuids:
            on_it = [
                tenancy
                for tenancy in self._tenants.values()
                if uuid in tenancy.releases and uuid not in tenancy.verdicts
            ]
            pauses = [
                releases.pause_s(tenancy.releases[uuid].waited_s(now))
                if tenancy.releases[uuid].is_waited_for
                else releases.sample_s(now - tenancy.began)
                for tenancy in on_it
            ]
            self._readers.every(uuid, min(pauses, default=None))

    # ---- verdicts

    def see_time(self) -> None:
        """Tell the verdicts that have become final."""
        now = time.monotonic()
        for tenancy in [tenancy for tenancy in self._tenants.values() if tenancy.is_gone]:
            for uuid, release in tenancy.releases.items():
                verdict = release.verdict(now, tenancy.limit_s)
                if verdict is not None:
                    tenancy.verdicts.setdefault(uuid, verdict)
            if tenancy.verdicts.keys() == tenancy.releases.keys():
                self._finish(tenancy, now)

    def _finish(self, tenancy: _Tenancy, now: float) -> None:
        del self._tenants[tenancy.order.key]
        if tenancy.keeper is not None:
            os.close(tenancy.keeper)
        self._pace(tenancy.releases)
        rows = [self._row(tenancy, uuid, now) for uuid in tenancy.releases]
        if not self._is_heard and any(row.verdict != "freed" or row.foreign for row in rows):
            # The lease stays in the store; whoever asks next finds that its broker has died, and judges. A process that
            # has come may be of this tree: that its keeper has ended is no proof that its tree has.
            self._held.pop(tenancy.held.number, None)
            tenancy.held.is_closed = False
            return
        self._write_down(tenancy, rows)
        self._settle(tenancy.held)
        self._report(Released(tenancy.order.key, rows))

    def _write_down(self, tenancy: _Tenancy, rows: list[DeviceRelease]) -> None:
        held = tenancy.held
        for row in rows:
            reason = self._reason(tenancy, row)
            if reason:
                held.quarantined.add(row.uuid)
                self._quarantine(held.id, tenancy.order.key, row.uuid, reason)
        self._edits.add(lambda book: grants.remove_tenant(book, held.id, tenancy.order.key))
        if not held.is_closed:
            self._report(LeaseStatus(held.number, "granted", "", held.usable))

    def _quarantine(self, lease: str, key: int, uuid: str, reason: str) -> None:
        now = time.time()
        self._edits.add(lambda book: grants.quarantine(book, lease, uuid, reason, now, key=key))
        self._log.write(f"{uuid} is quarantined: {reason}")

    def _reason(self, tenancy: _Tenancy, row: DeviceRelease) -> str:
        if row.verdict == "held":
            mib = tenancy.releases[row.uuid].judgement.excess_bytes // _MIB
            return f"{mib} MiB did not come back from {tenancy.order.name!r} in {row.waited_s:.1f} s"
        release = tenancy.releases[row.uuid]
        is_blind = row.verdict == "unknown" and (not release.is_judged or release.baseline is None)
        return f"its memory cannot be told since {tenancy.order.name!r}: {row.note}" if is_blind else ""

    def _row(self, tenancy: _Tenancy, uuid: str, now: float) -> DeviceRelease:
        release = tenancy.releases[uuid]
        return DeviceRelease(
            uuid=uuid,
            index=self._indexes.get(uuid, -1),
            verdict=tenancy.verdicts[uuid],
            baseline_mib=_mib(release.baseline),
            peak_mib=None if release.peak_bytes is None else round(release.peak_bytes / _MIB),
            now_mib=_mib(release.now),
            own=_processes(release.judgement.own, release.now, tenancy.commands),
            foreign=_processes(release.judgement.foreign, release.now, {}),
            waited_s=release.waited_s(now if release.freed_at is None else release.freed_at),
            freed_at=release.freed_at,
            note=release.note,
        )


def _processes(pids: Iterable[int], reading: Reading | Fault, commands: dict[int, str]) -> list[GpuProcess]:
    told = (reading.processes or {}) if isinstance(reading, Reading) else {}
    found = []
    for pid in sorted(pids)[:_MOST_PROCESSES]:
        held = told.get(pid)
        command = commands.get(pid) or procfs.command_line(pid)[:_MOST_CHARACTERS]
        found.append(GpuProcess(pid, None if held is None else round(held / _MIB), command))
    return found


def _mib(reading: Reading | Fault | None) -> int | None:
    return round(reading.used_bytes / _MIB) if isinstance(reading, Reading) else None


def _unknown(uuid: str, note: str) -> DeviceRelease:
    return DeviceRelease(uuid, -1, "unknown", None, None, None, [], [], 0.0, None, note)


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None  # it has died already; the watchdog says so
