"""Who gets which device, in which order, and what a lease's changes do to the book. Pure.

Each function takes a book and gives the one that follows, which the store makes true in one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from harness.broker import verdicts
from harness.broker.book import WATCHED_MIB, Baseline, Book, Lease, Quarantine, Tenant, Waiter
from harness.broker.readings import Fault, Reading

# By UUID: the device's generation when the reading was begun, and the reading.
Readings: TypeAlias = Mapping[str, tuple[int, "Reading | Fault"]]
_MIB = 1 << 20


@dataclass(frozen=True)
class Granted:
    """The lease is in the book, with these devices."""

    devices: tuple[str, ...]


@dataclass(frozen=True)
class Waits:
    """Its turn has not come, or these devices have to be read first."""

    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    """It can never be granted here, and why."""

    text: str


Answer: TypeAlias = Granted | Waits | Refused

# ---- the queue


def enqueue(book: Book, waiter: Waiter) -> Book:
    """Put a waiter at the end of the queue, unless it is in it, or has its lease."""
    if waiter_of(book, waiter.id) is not None or lease_of(book, waiter.id) is not None:
        return book
    waiter = replace(waiter, ticket=book.next_ticket)
    return replace(book, waiters=(*book.waiters, waiter), next_ticket=book.next_ticket + 1)


def withdraw(book: Book, lease_id: str) -> Book:
    """Take a waiter out of the queue."""
    return replace(book, waiters=tuple(waiter for waiter in book.waiters if waiter.id != lease_id))


def waiter_of(book: Book, lease_id: str) -> Waiter | None:
    """Give a waiter by the id of its lease."""
    return next((waiter for waiter in book.waiters if waiter.id == lease_id), None)


def grant(book: Book, lease_id: str, readings: Readings, now: float, user: int = 0) -> tuple[Book, Answer]:
    """Grant a waiter its lease, if its turn has come: all that it wants, or nothing.

    Its turn has come when no earlier waiter could use the devices that it gets. A device that nobody has is granted on
    a reading that was begun since it became free, which is its baseline from then on. Who has a lease already is told
    so again: a broker cannot always know whether its last change was made.
    """
    had = lease_of(book, lease_id)
    if had is not None:
        return book, Granted(tuple(had.devices))
    waiter = waiter_of(book, lease_id)
    if waiter is None:
        return book, Refused("it does not wait any more")
    answer = _decide(book, waiter, readings)
    if isinstance(answer, Granted):
        book = replace(book, baselines=_baselines(book, answer.devices, readings, now))
        book = _granted(book, waiter, answer.devices, now, user)
    return book, answer


def _decide(book: Book, waiter: Waiter, readings: Readings) -> Answer:
    count = waiter.want.count
    usable = [uuid for uuid in waiter.want.candidates if not _hindrance(book, uuid, waiter, readings)]
    if len(usable) < count:
        # A quarantine ends when the memory is back, which may be so by now.
        quarantined = [uuid for uuid in waiter.want.candidates if uuid in book.quarantines]
        unread = tuple(uuid for uuid in quarantined if not _is_fresh(book, uuid, readings))
        return Waits(unread) if unread else Refused(_refusal(book, waiter, readings, len(usable)))
    open_to_it = [uuid for uuid in usable if not _is_awaited(book, uuid, waiter, readings)]
    ready, needs = _ready(book, waiter, open_to_it, readings)
    if len(open_to_it) < count or needs or len(ready) < count:
        return Waits(tuple(needs) if len(open_to_it) >= count else ())
    return Granted(tuple(ready[:count]))


def _is_awaited(book: Book, uuid: str, waiter: Waiter, readings: Readings) -> bool:
    """Say whether somebody who came earlier could use a device."""
    if _goes_ahead(book, waiter):
        return False
    return any(
        other.ticket < waiter.ticket and uuid in other.want.candidates and not _hindrance(book, uuid, other, readings)
        for other in book.waiters
    )


def _goes_ahead(book: Book, waiter: Waiter) -> bool:
    # The servers of one process may wait for one another, as ranks do. Behind somebody who waits for whole devices the
    # second of them would wait for ever: that one waits for the first.
    if waiter.want.memory_mib != WATCHED_MIB:
        return False
    return any(lease.broker == waiter.broker and WATCHED_MIB in lease.devices.values() for lease in book.leases)


def _hindrance(book: Book, uuid: str, waiter: Waiter, readings: Readings) -> str:
    """Say why a device can never be had by this waiter, "" if it can."""
    if uuid in book.quarantines:
        return f"is quarantined: {book.quarantines[uuid].reason}"
    # One from before the device became free shows what the last lease had.
    reading = readings[uuid][1] if _is_fresh(book, uuid, readings) else None
    if isinstance(reading, Fault) and reading.kind == "lost":
        return f"is lost: {reading.text}"
    known = book.baselines[uuid].reading if uuid in book.baselines else reading
    share = waiter.want.memory_mib
    if share is not None and isinstance(known, Reading) and _most_mib(known) < share:
        return f"has at most {_most_mib(known)} MiB to give, and {share} are wanted"
    return ""


def _most_mib(reading: Reading) -> int:
    """Give what may ever be free: what is known to be a process's may come back."""
    lasting_bytes = verdicts.unlisted_bytes(reading)
    return (reading.total_bytes - (reading.used_bytes if lasting_bytes is None else lasting_bytes)) // _MIB


def _refusal(book: Book, waiter: Waiter, readings: Readings, usable: int) -> str:
    reasons = [
        f"{uuid} {hindrance}"
        for uuid in waiter.want.candidates
        if (hindrance := _hindrance(book, uuid, waiter, readings))
    ]
    return f"{waiter.want.count} GPUs are wanted, and {usable} can be had: {'; '.join(reasons)}"


def _room_mib(baseline: Reading, shares: Iterable[int]) -> int:
    return (baseline.total_bytes - baseline.used_bytes) // _MIB - sum(shares)


def _ready(book: Book, waiter: Waiter, uuids: list[str], readings: Readings) -> tuple[list[str], list[str]]:
    """Give the devices that it could have now, the best first, and those that have to be read before that is known."""
    ranked: list[tuple[tuple[int, int], str]] = []
    needs: list[str] = []
    for uuid in uuids:
        rank = _rank(book, uuid, waiter, readings)
        if rank is None and _may_need_reading(book, uuid, waiter.want.memory_mib, readings):
            needs.append(uuid)
        elif rank is not None:
            ranked.append((rank, uuid))
    return [uuid for _, uuid in sorted(ranked, key=lambda found: found[0])], needs


def _is_fresh(book: Book, uuid: str, readings: Readings) -> bool:
    return uuid in readings and readings[uuid][0] == book.generation(uuid)


def _may_need_reading(book: Book, uuid: str, share: int | None, readings: Readings) -> bool:
    is_fresh = _is_fresh(book, uuid, readings)
    holders = book.holders_of(uuid)
    if holders and (share is None or any(lease.devices[uuid] is None for lease in holders)):
        return False  # somebody has it, whatever a reading says
    return not is_fresh and (not holders or len(book.leases_on(uuid)) > len(holders))


def _rank(book: Book, uuid: str, waiter: Waiter, readings: Readings) -> tuple[int, int] | None:
    """Say how well a device suits, the lowest best; None if it cannot be had now, or if that is not known."""
    share = waiter.want.memory_mib
    holders = book.holders_of(uuid)
    leaving = [lease for lease in book.leases_on(uuid) if lease not in holders]
    reading = readings[uuid][1] if _is_fresh(book, uuid, readings) else None
    if (holders or leaving) and uuid not in book.baselines:
        return None  # whether memory is back cannot be told without
    if leaving and not (isinstance(reading, Reading) and _have_left(book, uuid, leaving, reading, waiter)):
        return None
    if holders:
        return _rank_of_shared(book.baselines[uuid].reading, [lease.devices[uuid] for lease in holders], share)
    return _rank_of_free(book.baselines[uuid].reading if leaving else reading, share)


def _rank_of_shared(baseline: Reading, shares: list[int | None], share: int | None) -> tuple[int, int] | None:
    # The best is the one that has the least left afterwards: large shares find room on the others.
    taken = [mib for mib in shares if mib is not None]
    if share is None or len(taken) < len(shares):
        return None
    room = _room_mib(baseline, taken) - share
    return None if room < 0 else (0, room)


def _rank_of_free(known: Reading | Fault | None, share: int | None) -> tuple[int, int] | None:
    if not isinstance(known, Reading) or (share is not None and _room_mib(known, ()) < share):
        return None
    return (1, known.used_bytes)


def _have_left(book: Book, uuid: str, leaving: list[Lease], reading: Reading, waiter: Waiter) -> bool:
    # Their memory was back; it must not have come again since. The pids that another PID namespace's broker has seen
    # say nothing of what is listed here.
    if any(lease.broker.namespace != waiter.broker.namespace for lease in leaving):
        return False
    own = {pid for lease in leaving for pid in pids_of(lease)}
    neighbours = {pid for lease in book.holders_of(uuid) for pid in pids_of(lease)}
    if own & set(reading.processes or {}):
        return False
    if book.holders_of(uuid):
        return True
    baseline = book.baselines[uuid].reading
    judged = verdicts.judge(baseline, reading, own=own, neighbours=neighbours, sees_pids=bool(own), is_shared=False)
    return judged.verdict == "freed"


def _baselines(book: Book, chosen: Iterable[str], readings: Readings, now: float) -> dict[str, Baseline]:
    baselines = dict(book.baselines)
    for uuid in chosen:
        reading = readings[uuid][1] if uuid in readings else None
        if not book.leases_on(uuid) and isinstance(reading, Reading):
            baselines[uuid] = Baseline(reading, now)
    return baselines


def _granted(book: Book, waiter: Waiter, chosen: tuple[str, ...], now: float, user: int) -> Book:
    lease = Lease(
        id=waiter.id,
        name=waiter.name,
        test=waiter.test,
        user=user,
        since=now,
        broker=waiter.broker,
        devices=dict.fromkeys(chosen, waiter.want.memory_mib),
    )
    book = raised(withdraw(book, waiter.id), chosen)
    return replace(book, leases=(*book.leases, lease))


def raised(book: Book, uuids: Iterable[str]) -> Book:
    """Give devices another generation: what was read of them before counts no more."""
    generations = {**book.generations, **{uuid: book.generation(uuid) + 1 for uuid in uuids}}
    return replace(book, generations=generations)


# ---- leases


def pids_of(lease: Lease) -> set[int]:
    """Give the pids of a lease's tenants that devices have listed."""
    return {pid for tenant in lease.tenants for pid, _ in tenant.pids}


def lease_of(book: Book, lease_id: str) -> Lease | None:
    """Give a lease by its id."""
    return next((lease for lease in book.leases if lease.id == lease_id), None)


def changed(book: Book, lease_id: str, change: Callable[[Lease], Lease]) -> Book:
    """Change one lease."""
    return replace(book, leases=tuple(change(lease) if lease.id == lease_id else lease for lease in book.leases))


def add_tenant(book: Book, lease_id: str, tenant: Tenant) -> Book:
    """Write down a server on a lease."""
    return changed(book, lease_id, lambda lease: replace(lease, tenants=(*lease.tenants, tenant)))


def remove_tenant(book: Book, lease_id: str, key: int) -> Book:
    """Strike a server whose memory has been judged."""
    return changed(
        book, lease_id, lambda lease: replace(lease, tenants=tuple(one for one in lease.tenants if one.key != key))
    )


def note_pids(book: Book, lease_id: str, key: int, pids: tuple[tuple[int, int], ...]) -> Book:
    """Write down which processes of a server its devices have listed."""

    def change(lease: Lease) -> Lease:
        return replace(
            lease, tenants=tuple(replace(one, pids=pids) if one.key == key else one for one in lease.tenants)
        )

    return changed(book, lease_id, change)


def set_leaving(book: Book, lease_id: str, uuid: str) -> Book:
    """Let a device take no room any more: its memory is back, though a tenant's tree is still ending."""
    lease = lease_of(book, lease_id)
    if lease is None or uuid not in lease.devices or uuid in lease.leaving:
        return book
    return raised(changed(book, lease_id, lambda found: replace(found, leaving=(*found.leaving, uuid))), [uuid])


def end(book: Book, lease_id: str, uuids: Iterable[str]) -> Book:
    """Give devices of a lease back; with the last one the lease ends. A baseline goes with the last lease."""
    lease = lease_of(book, lease_id)
    given = [uuid for uuid in uuids if lease is not None and uuid in lease.devices]
    if lease is None or not given:
        return book
    left = {uuid: mib for uuid, mib in lease.devices.items() if uuid not in given}
    kept = replace(lease, devices=left, leaving=tuple(uuid for uuid in lease.leaving if uuid in left))
    leases = tuple(kept if one is lease else one for one in book.leases if one is not lease or left)
    return _without_baselines(raised(replace(book, leases=leases), given))


def _without_baselines(book: Book) -> Book:
    used = {uuid for lease in book.leases for uuid in lease.devices} | set(book.quarantines)
    return replace(book, baselines={uuid: found for uuid, found in book.baselines.items() if uuid in used})


def quarantine(book: Book, lease_id: str, uuid: str, reason: str, now: float, *, key: int | None = None) -> Book:
    """Take a device from a lease, and give it to nobody until its memory is back. Its baseline is kept.

    Where another lease's memory is awaited there already, both are awaited from then on. If it is the memory of the
    tenant `key` alone, and another tenant of the lease is on the device, the lease keeps that as long as it lasts.
    """
    lease = lease_of(book, lease_id)
    if lease is None or uuid not in lease.devices:
        return book
    is_used = key is not None and any(one.key != key and uuid in one.devices for one in lease.tenants)
    leaked = [one for one in lease.tenants if one.key == key or not is_used]
    pids = tuple(sorted({pid for tenant in leaked for pid in tenant.pids}))
    entry = Quarantine(reason, now, lease.name, pids, lease.broker.namespace, lease.stale_since is None)
    if uuid in book.quarantines:
        entry = _both(book.quarantines[uuid], entry)
    book = replace(book, quarantines={**book.quarantines, uuid: entry})
    return raised(book, [uuid]) if is_used else end(book, lease_id, [uuid])


def _both(before: Quarantine, after: Quarantine) -> Quarantine:
    # Of pids from two namespaces nobody could say whose they are: then none is known.
    is_one = before.namespace == after.namespace
    pids = tuple(sorted({*before.pids, *after.pids})) if is_one else ()
    is_complete = before.is_complete and after.is_complete
    return replace(before, reason=f"{before.reason}; {after.reason}", pids=pids, is_complete=is_complete)


def lift(book: Book, uuid: str) -> Book:
    """End a quarantine."""
    if uuid not in book.quarantines:
        return book
    left = {other: found for other, found in book.quarantines.items() if other != uuid}
    return _without_baselines(raised(replace(book, quarantines=left), [uuid]))
