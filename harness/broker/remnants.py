"""What dead brokers, watchdogs and keepers have left in the book, and how it ends. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from harness.broker import verdicts
from harness.broker.book import Who
from harness.broker.grants import changed, end, lift, pids_of, quarantine, raised

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.broker.book import Book
    from harness.broker.grants import Readings


def prune(
    book: Book,
    is_alive: Callable[[Who], bool | None],
    readings: Readings,
    now: float,
    limit_s: float,
    *,
    is_stopped: Callable[[Who], bool] = lambda _who: False,
) -> tuple[Book, tuple[str, ...]]:
    """End what nobody is left to end; give lines that say what was done.

    `is_alive` gives None where that cannot be known (another PID namespace), which counts as alive. Somebody stopped
    (SIGSTOP) loses his place in the queue, or nobody behind him would get anything. A lease is stale when its broker
    and its tenants' keepers are all dead: a device of it ends when its memory is back, and is quarantined if a reading
    shows after `limit_s` that it is not. A quarantine ends when the memory is back.
    """
    waiters = tuple(
        waiter for waiter in book.waiters if is_alive(waiter.broker) is not False and not is_stopped(waiter.broker)
    )
    book = book if waiters == book.waiters else replace(book, waiters=waiters)
    lines: list[str] = []
    for lease in book.leases:
        if any(is_alive(who) is not False for who in (lease.broker, *(one.keeper for one in lease.tenants))):
            continue
        if lease.stale_since is None:
            # A reading from before this moment proves nothing.
            book = raised(changed(book, lease.id, lambda found: replace(found, stale_since=now)), lease.devices)
            continue
        for uuid in lease.devices:
            judged = _judge(book, uuid, readings, pids_of(lease), but=lease.id, is_complete=False)
            if judged is None:
                continue  # nobody may have looked since
            if judged.verdict == "freed":
                lines.append(f"{uuid} is back from {lease.name!r} of {lease.test}, whose processes are dead")
                book = end(book, lease.id, [uuid])
            elif now - lease.stale_since >= limit_s:
                reason = _reason(judged, f"{lease.name!r} of {lease.test}, whose processes are dead")
                lines.append(f"{uuid} is quarantined: {reason}")
                book = quarantine(book, lease.id, uuid, reason, now)
    return _lift_what_is_back(book, is_alive, readings, lines), tuple(lines)


def _reason(judged: verdicts.Judgement, whose: str) -> str:
    if judged.verdict == "held":
        return f"{judged.excess_bytes >> 20} MiB did not come back from {whose}"
    return f"its memory cannot be told since {whose}: {judged.note}"


def _lift_what_is_back(
    book: Book, is_alive: Callable[[Who], bool | None], readings: Readings, lines: list[str]
) -> Book:
    for uuid, entry in book.quarantines.items():
        # The numbers of another PID namespace say nothing of what is listed here.
        own = {pid for pid, start in entry.pids if is_alive(Who(pid, start, entry.namespace)) is not None}
        judged = _judge(book, uuid, readings, own, is_complete=entry.is_complete)
        if judged is not None and judged.verdict == "freed":
            lines.append(f"{uuid} is in quarantine no more: its memory is back")
            book = lift(book, uuid)
    return book


def _judge(
    book: Book, uuid: str, readings: Readings, own: set[int], *, is_complete: bool, but: str = ""
) -> verdicts.Judgement | None:
    """Judge a device by a reading that counts; None if there is none.

    `but` is the id of the lease that is judged. Unless `own` is complete, a process that has come may be its own.
    """
    generation, reading = readings.get(uuid, (-1, None))
    if reading is None or generation != book.generation(uuid):
        return None
    if uuid not in book.baselines:
        return verdicts.Judgement("unknown", (), (), 0, "its baseline has been lost from the store")
    others = [lease for lease in book.leases_on(uuid) if lease.id != but]
    neighbours = {pid for lease in others for pid in pids_of(lease)}
    baseline = book.baselines[uuid].reading
    judged = verdicts.judge(
        baseline, reading, own=own, neighbours=neighbours, sees_pids=bool(own), is_shared=bool(others)
    )
    if judged.verdict == "freed" and judged.foreign and not is_complete:
        return replace(judged, verdict="unknown", note="processes have come that may be of its tree")
    return judged
