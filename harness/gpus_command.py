"""`python -m harness gpus`: which devices there are, who has them, who waits; and lifting a quarantine.

The store is read without its lock, and NVML by threads that nobody waits for: neither a process that is stopped nor a
driver that hangs holds this up.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness import leasing, procfs, state_dir
from harness.broker import book as books
from harness.broker import grants, words
from harness.broker.readings import Device, Fault
from harness.broker.store import Store, StoreError
from harness.broker.survey import Survey, survey
from harness.errors import HarnessError, SpecError
from harness.watchdog import ledger

if TYPE_CHECKING:
    from harness.broker.book import Book, Lease, Waiter, Who

_SURVEY_S = 5.0
# It is held for well under a millisecond at a time, but by a stopped process.
_LOCK_S = 2.0
_MIB = 1 << 20
_HEADINGS = ("GPU", "USED", "TOTAL", "BASELINE MiB", "UUID", "NAME", "STATE")


@dataclass(frozen=True)
class HolderRow:
    """A lease of a device. `share_mib` is None for the whole of it, `is_alive` where that cannot be known."""

    name: str
    test: str
    user: int
    pid: int
    since_s: float
    share_mib: int | None
    is_leaving: bool
    is_alive: bool | None
    text: str


@dataclass(frozen=True)
class DeviceRow:
    """A device. `state` is one of "free", "leased", "quarantined"; what NVML does not tell is None."""

    index: int | None
    uuid: str
    name: str
    used_mib: int | None
    total_mib: int | None
    baseline_mib: int | None
    state: str
    leases: tuple[HolderRow, ...]
    quarantine: str
    quarantined_s: float | None
    fault: str


@dataclass(frozen=True)
class WaiterRow:
    """Somebody who waits, and what for."""

    name: str
    test: str
    pid: int
    since_s: float
    text: str


@dataclass(frozen=True)
class Gpus:
    """Everything. `nvml` says why there are no devices, "" if there are; `released` what was done."""

    store: str
    nvml: str
    devices: tuple[DeviceRow, ...]
    waiters: tuple[WaiterRow, ...]
    released: tuple[str, ...]
    is_fine: bool


def look(given_state_dir: str | None, release: str | None = None) -> Gpus:
    """Find out everything, after a release if one is wanted; raises HarnessError."""
    directory, store = _store(given_state_dir)
    seen = survey(_SURVEY_S)
    try:
        released = () if release is None else _release(store, seen, release)
        book = _book(store.read())
    except (StoreError, ValueError) as error:
        raise HarnessError(str(error)) from None
    now = time.time()
    devices = tuple(_device_row(device, book, seen, now) for device in _devices(book, seen))
    waiters = tuple(_waiter_row(book, waiter, now) for waiter in sorted(book.waiters, key=lambda one: one.ticket))
    is_fine = not any(row.quarantine or row.fault for row in devices) and (seen.is_absent or not seen.failure)
    return Gpus(directory, seen.failure, devices, waiters, released, is_fine)


def _store(given_state_dir: str | None) -> tuple[str, Store]:
    """Give the store that a run would use, and its directory. Nothing is made."""
    is_missing = given_state_dir is None and not state_dir.default().exists()
    found = state_dir.default() if is_missing else state_dir.find(given_state_dir, make=False)
    terms = leasing.terms(found, wait_s=0.0, release_s=0.0)
    return terms.store, Store(terms.store, is_shared=terms.is_shared)


def _book(content: dict[str, Any]) -> Book:
    return books.forget_other_boot(books.Book.from_json_dict(content), ledger.boot())


# ---- releasing


def _release(store: Store, seen: Survey, wanted: str) -> tuple[str, ...]:
    """Lift what is wanted; give what was done."""
    chosen = _chosen(wanted, _book(store.read()), seen)
    if not chosen:
        return ("nothing is quarantined",)

    def edit(content: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        book = _book(content)
        lines: list[str] = []
        for uuid in chosen:
            book, line = _lift(book, uuid)
            lines.append(line)
            if wanted != "all":
                book = _end_leases(book, uuid, lines)
        return book.to_json_dict(), tuple(lines)

    return store.change(edit, timeout_s=_LOCK_S)


def _chosen(wanted: str, book: Book, seen: Survey) -> list[str]:
    devices = _devices(book, seen)
    if wanted == "all":
        return list(book.quarantines)
    if wanted.isdecimal():
        found = [device.uuid for device in devices if device.index == int(wanted)]
    else:
        found = [device.uuid for device in devices if wanted and device.uuid.startswith(wanted)]
    if len(found) != 1:
        known = ", ".join(device.uuid for device in devices) or "none"
        raise SpecError(f"{wanted!r} names {len(found) or 'none'} of the GPUs that there are: {known}")
    return found


def _lift(book: Book, uuid: str) -> tuple[Book, str]:
    if uuid not in book.quarantines:
        return book, f"{uuid} is not in quarantine"
    return grants.lift(book, uuid), f"{uuid} is in quarantine no more"


def _end_leases(book: Book, uuid: str, lines: list[str]) -> Book:
    """End a device's leases of whom nobody is known to be alive: those of another PID namespace never end else."""
    for lease in book.leases_on(uuid):
        who = words.describe_holder(lease, uuid, time.time())
        if _is_anybody_alive(lease):
            lines.append(f"{uuid} stays leased: it is held by {who}, which is alive")
        else:
            book = grants.end(book, lease.id, [uuid])
            lines.append(f"{uuid} is given back, which was held by {who}")
    return book


def _is_anybody_alive(lease: Lease) -> bool | None:
    """Say whether the broker or a keeper of a lease lives; None where that cannot be known."""
    known = [_is_alive(who) for who in (lease.broker, *(tenant.keeper for tenant in lease.tenants))]
    return True if True in known else None if None in known else False


def _is_alive(who: Who) -> bool | None:
    if who.namespace != os.stat("/proc/self/ns/pid").st_ino:
        return None
    return procfs.may_be_alive(who.pid, who.start_time)


# ---- what there is


def _devices(book: Book, seen: Survey) -> list[Device]:
    """Give the devices that NVML tells of, and those of which only the book does (`index` -1)."""
    known = {device.uuid for device in seen.devices}
    told = [*(uuid for lease in book.leases for uuid in lease.devices), *book.quarantines]
    return [*seen.devices, *(Device(uuid, -1, "", 0) for uuid in dict.fromkeys(told) if uuid not in known)]


def _device_row(device: Device, book: Book, seen: Survey, now: float) -> DeviceRow:
    reading = seen.readings.get(device.uuid)
    baseline = book.baselines.get(device.uuid)
    quarantine = book.quarantines.get(device.uuid)
    leases = tuple(_holder_row(lease, device.uuid, now) for lease in book.leases_on(device.uuid))
    return DeviceRow(
        index=device.index if device.index >= 0 else None,
        uuid=device.uuid,
        name=device.name,
        used_mib=None if reading is None or isinstance(reading, Fault) else reading.used_bytes // _MIB,
        total_mib=device.total_bytes // _MIB or None,
        baseline_mib=None if baseline is None else baseline.reading.used_bytes // _MIB,
        state="quarantined" if quarantine is not None else "leased" if leases else "free",
        leases=leases,
        quarantine="" if quarantine is None else f"{quarantine.reason} (lease {quarantine.lease!r})",
        quarantined_s=None if quarantine is None else _age_s(quarantine.since, now),
        fault=reading.text if isinstance(reading, Fault) else "",
    )


def _holder_row(lease: Lease, uuid: str, now: float) -> HolderRow:
    is_alive = _is_anybody_alive(lease)
    text = words.describe_holder(lease, uuid, now)
    if is_alive is False and lease.stale_since is None:
        text += ", whose processes are dead"
    if is_alive is None:
        text += ", in another PID namespace"
    return HolderRow(
        name=lease.name,
        test=lease.test,
        user=lease.user,
        pid=(lease.tenants[0].keeper if lease.tenants else lease.broker).pid,
        since_s=_age_s(lease.since, now),
        share_mib=lease.devices[uuid],
        is_leaving=uuid in lease.leaving,
        is_alive=is_alive,
        text=text,
    )


def _waiter_row(book: Book, waiter: Waiter, now: float) -> WaiterRow:
    text = words.describe_wait(book, waiter.id, now)
    return WaiterRow(waiter.name, waiter.test, waiter.broker.pid, _age_s(waiter.since, now), text)


def _age_s(since: float, now: float) -> float:
    return round(max(0.0, now - since), 1)


# ---- as text


def lines(found: Gpus) -> list[str]:
    """Give everything as lines of text, which may hold what a process has chosen itself."""
    said = list(found.released)
    if found.nvml:
        said.append(found.nvml)
    if found.devices:
        said += _columns([_HEADINGS, *(cells for row in found.devices for cells in _cells(row))])
    if found.waiters:
        said.append("Waiting, in this order:")
    said += [
        f"  {row.name!r} of {row.test} (pid {row.pid}) for {row.since_s:.0f} s: {row.text}" for row in found.waiters
    ]
    return said or ["there is no GPU"]


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cells(row: DeviceRow) -> list[tuple[str, ...]]:
    """Give a device's lines: the first has its figures, each has one thing that is said of its state."""
    states = [f"leaving: {lease.text}" if lease.is_leaving else f"leased by {lease.text}" for lease in row.leases]
    if row.quarantined_s is not None:
        states.insert(0, f"quarantined for {row.quarantined_s:.0f} s: {row.quarantine}")
    if row.fault:
        states.insert(0, f"cannot be read: {row.fault}")
    figures = [row.index, row.used_mib, row.total_mib, row.baseline_mib]
    first = [*("-" if figure is None else str(figure) for figure in figures), row.uuid, row.name or "-"]
    return [(*(first if number == 0 else [""] * len(first)), state) for number, state in enumerate(states or ["free"])]
