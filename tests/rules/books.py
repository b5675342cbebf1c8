"""Books for tests of the rules on leases, and what must hold of any."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from harness.broker.book import Book, Tenant, Waiter, Want, Who
from harness.broker.grants import Answer, Granted, add_tenant, enqueue, grant
from harness.broker.readings import Fault, Reading

if TYPE_CHECKING:
    from collections.abc import Iterable

    from harness.broker.grants import Readings

MIB, GIB = 1 << 20, 1 << 30
TOTAL_MIB = 80 * 1024
EMPTY = Reading(0, 80 * GIB, 2, {})
BROKER, OTHER = Who(10, 1000, 7), Who(11, 1100, 7)
CONTAINER = Who(10, 1000, 8)  # of another PID namespace
NOW = 5000.0


def used(mib: int, processes: dict[int, int | None] | None = None, *, total_mib: int = TOTAL_MIB) -> Reading:
    """Give a reading; without `processes` one of them holds all that is used."""
    return Reading(mib * MIB, total_mib * MIB, 2, {900: mib * MIB} if processes is None else processes)


def waiting(
    book: Book, name: str, count: int, candidates: Iterable[str], mib: int | None = None, *, broker: Who = BROKER
) -> Book:
    """Put a waiter into the queue whose id is its name."""
    return enqueue(book, Waiter(0, name, name, f"test_{name}", broker, NOW, Want(count, tuple(candidates), mib)))


def fresh(book: Book, **readings: Reading | Fault) -> Readings:
    """Give readings that were begun in this book, by UUID."""
    return {uuid: (book.generation(uuid), reading) for uuid, reading in readings.items()}


def asked(book: Book, name: str, **readings: Reading | Fault) -> tuple[Book, Answer]:
    """Ask for a waiter's lease, with fresh readings."""
    return grant(book, name, fresh(book, **readings), NOW, user=1)


def granted(book: Book, name: str, **readings: Reading | Fault) -> Book:
    """Grant a waiter its lease."""
    book, answer = asked(book, name, **readings)
    assert isinstance(answer, Granted), answer
    return book


def held(book: Book, name: str, devices: str, mib: int | None = None, *, broker: Who = BROKER) -> Book:
    """Give somebody these devices, each a letter, which are empty; or a share of each."""
    book = waiting(book, name, len(devices), devices, mib, broker=broker)
    return granted(book, name, **dict.fromkeys(devices, EMPTY))


def served(book: Book, name: str, pid: int, *, keeper: int = 20, devices: str = "A") -> Book:
    """Put a server on a lease, of which its devices list one process."""
    tenant = Tenant(pid, f"server{pid}", Who(keeper, 2000, 7), tuple(devices), ((pid, 3000),))
    return add_tenant(book, name, tenant)


def read_back(book: Book) -> Book:
    """Give what the store makes of a book."""
    return Book.from_json_dict(json.loads(json.dumps(book.to_json_dict(), allow_nan=False)))


def check_invariants(book: Book) -> None:
    """Check what holds of every book, whatever has happened."""
    assert read_back(book) == book
    leased = {uuid for lease in book.leases for uuid in lease.devices}
    assert book.baselines.keys() == leased | book.quarantines.keys()
    for uuid in leased:
        shares = [lease.devices[uuid] for lease in book.holders_of(uuid)]
        if None in shares:
            assert len(shares) == 1, f"{uuid} is had as a whole, and by others"
        else:
            baseline = book.baselines[uuid].reading
            room_mib = (baseline.total_bytes - baseline.used_bytes) // MIB
            assert not shares or sum(mib for mib in shares if mib is not None) <= room_mib
    assert all(lease.devices for lease in book.leases)
    tickets = [waiter.ticket for waiter in book.waiters]
    assert tickets == sorted(set(tickets))
