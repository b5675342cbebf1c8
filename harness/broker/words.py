"""What the book says to people. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.broker.grants import waiter_of

if TYPE_CHECKING:
    from harness.broker.book import Book, Lease, Waiter


def describe_wait(book: Book, lease_id: str, now: float) -> str:
    """Say who has what a waiter waits for, and since when; in one line."""
    waiter = waiter_of(book, lease_id)
    if waiter is None:
        return "it does not wait any more"
    want = waiter.want
    what = f"waiting for {want.count} of {len(want.candidates)} GPUs"
    what += "" if want.memory_mib is None else f" with {want.memory_mib} MiB"
    parts = [text for uuid in want.candidates for text in _holders(book, uuid, now)]
    ahead = [other for other in book.waiters if other.ticket < waiter.ticket and _compete(other, waiter)]
    if ahead:
        first = ahead[0]
        parts.append(
            f"{len(ahead)} came earlier, the first {first.name!r} of {first.test} {now - first.since:.0f} s ago"
        )
    if not parts:
        parts = ["nobody has leased them, but NVML has not told that they are free, or others use too much of them"]
    return f"{what}: {'; '.join(parts)}"


def _compete(one: Waiter, other: Waiter) -> bool:
    return not set(one.want.candidates).isdisjoint(other.want.candidates)


def _holders(book: Book, uuid: str, now: float) -> list[str]:
    if uuid in book.quarantines:
        return [f"{uuid} is quarantined: {book.quarantines[uuid].reason}"]
    return [f"{uuid} is held by {describe_holder(lease, uuid, now)}" for lease in book.holders_of(uuid)]


def describe_holder(lease: Lease, uuid: str, now: float) -> str:
    """Say who has a device, since when, and how much of it."""
    who = lease.tenants[0].keeper if lease.tenants else lease.broker
    text = f"{lease.name!r} of {lease.test} (pid {who.pid}) for {now - lease.since:.0f} s"
    share = lease.devices[uuid]
    text += "" if share is None else f", {share} MiB of it"
    return text + (", whose processes are dead" if lease.stale_since is not None else "")
