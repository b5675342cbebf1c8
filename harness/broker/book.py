"""What the store holds, as frozen types, and their form in JSON. The rules on it are in `grants`. Pure.

Times are seconds since the epoch (`time.time`): processes that never meet, and people, read them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from harness.broker.readings import Reading

_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class Who:
    """A process for all time. `namespace` is the inode of its PID namespace, in which alone `pid` means anything."""

    pid: int
    start_time: int
    namespace: int


# A share that keeps nobody from a device but who wants it whole: its holder is only to have its memory watched.
WATCHED_MIB = 1


@dataclass(frozen=True)
class Want:
    """`count` of the `candidates` (UUIDs, the preferred first), whole or a share of `memory_mib` of each."""

    count: int
    candidates: tuple[str, ...]
    memory_mib: int | None


@dataclass(frozen=True)
class Waiter:
    """Somebody who waits for a lease; whose `ticket` is lower came earlier."""

    ticket: int
    id: str
    name: str
    test: str
    broker: Who
    since: float
    want: Want


@dataclass(frozen=True)
class Tenant:
    """A server on a lease. `pids` (with start times) are those of its tree that its devices have listed."""

    key: int
    name: str
    keeper: Who
    devices: tuple[str, ...]
    pids: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Lease:
    """Devices that somebody has: by UUID the share in MiB, None for the whole.

    `leaving` are those whose memory is back while a tenant's tree is still ending: they take no room. `stale_since` is
    when somebody first found that nobody of it is alive.
    """

    id: str
    name: str
    test: str
    user: int
    since: float
    broker: Who
    devices: dict[str, int | None]
    tenants: tuple[Tenant, ...] = ()
    leaving: tuple[str, ...] = ()
    stale_since: float | None = None


@dataclass(frozen=True)
class Baseline:
    """What a device had in use when its first lease was granted, at the time `taken`."""

    reading: Reading
    taken: float


@dataclass(frozen=True)
class Quarantine:
    """Why a device is given to nobody, since when, and after whose lease.

    `pids` (with start times) are those of the lease that the device has listed, in this PID `namespace`; `is_complete`
    unless its broker had died, so that nobody was there to note others.
    """

    reason: str
    since: float
    lease: str
    pids: tuple[tuple[int, int], ...] = ()
    namespace: int = 0
    is_complete: bool = True


@dataclass(frozen=True)
class Book:
    """Everything. A device's generation counts its grants and ends."""

    boot: str = ""
    next_ticket: int = 1
    leases: tuple[Lease, ...] = ()
    waiters: tuple[Waiter, ...] = ()
    baselines: dict[str, Baseline] = field(default_factory=dict)
    quarantines: dict[str, Quarantine] = field(default_factory=dict)
    generations: dict[str, int] = field(default_factory=dict)

    def leases_on(self, uuid: str) -> list[Lease]:
        """Give the leases of a device, the leaving ones included."""
        return [lease for lease in self.leases if uuid in lease.devices]

    def holders_of(self, uuid: str) -> list[Lease]:
        """Give the leases that take room on a device."""
        return [lease for lease in self.leases_on(uuid) if uuid not in lease.leaving]

    def generation(self, uuid: str) -> int:
        """Give how often the device was granted and given back."""
        return self.generations.get(uuid, 0)

    def to_json_dict(self) -> dict[str, object]:
        """Give the form in the store."""
        return asdict(self)

    @staticmethod
    def from_json_dict(content: dict[str, object]) -> Book:
        """Read what `to_json_dict` gave, or an empty dict; raises ValueError for anything else.

        Also for what contradicts itself, such as a device that two have as a whole: nothing could be granted on it
        without doing harm.
        """
        try:
            book = _book(content)
            _check(book)
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"the store of leases is not in the right form: {type(error).__name__}: {error}") from None
        return book


# A broker reads the book whenever it has changed, so what each type has is not looked up again each time.
_NAMES = {
    kind: {one.name for one in fields(kind)}
    for kind in (Who, Want, Waiter, Tenant, Lease, Reading, Baseline, Quarantine, Book)
}


def forget_other_boot(book: Book, boot: str) -> Book:
    """Give the book of this boot: a reboot has ended every process, and has freed all memory."""
    return book if book.boot == boot else Book(boot=boot)


def _check(book: Book) -> None:
    """Raise ValueError unless the parts agree: what the rules rely on, and keep true."""
    ids = [lease.id for lease in book.leases] + [waiter.id for waiter in book.waiters]
    tickets = [waiter.ticket for waiter in book.waiters]
    _demand(len(set(ids)) == len(ids), "an id is there twice")
    _demand(len(set(tickets)) == len(tickets) and max(tickets, default=0) < book.next_ticket, "a ticket is no ticket")
    for lease in book.leases:
        _demand(bool(lease.devices), f"{lease.id} has no device")
        _demand(set(lease.leaving) <= set(lease.devices), f"{lease.id} leaves what it does not have")
    leased = {uuid for lease in book.leases for uuid in lease.devices}
    _demand(set(book.baselines) <= leased | set(book.quarantines), "there is a baseline of what nobody has")
    for uuid in leased:
        shares = [lease.devices[uuid] for lease in book.holders_of(uuid)]
        _demand(None not in shares or len(shares) == 1, f"{uuid} is leased whole, and not alone")


def _demand(holds: bool, otherwise: str) -> None:  # noqa: FBT001 - it reads as an assertion does
    if not holds:
        raise ValueError(otherwise)


def _book(content: dict[str, Any]) -> Book:
    if content == {}:
        return Book()
    _fields(content, Book)
    return Book(
        boot=_is(content["boot"], str),
        next_ticket=_is(content["next_ticket"], int),
        leases=tuple(map(_lease, _list(content["leases"]))),
        waiters=tuple(map(_waiter, _list(content["waiters"]))),
        baselines={_is(uuid, str): _baseline(found) for uuid, found in content["baselines"].items()},
        quarantines={_is(uuid, str): _quarantine(found) for uuid, found in content["quarantines"].items()},
        generations={_is(uuid, str): _is(count, int) for uuid, count in content["generations"].items()},
    )


def _lease(found: dict[str, Any]) -> Lease:
    _fields(found, Lease)
    return Lease(
        id=_is(found["id"], str),
        name=_is(found["name"], str),
        test=_is(found["test"], str),
        user=_is(found["user"], int),
        since=_time(found["since"]),
        broker=_who(found["broker"]),
        devices={_is(uuid, str): _mib(mib) for uuid, mib in found["devices"].items()},
        tenants=tuple(map(_tenant, _list(found["tenants"]))),
        leaving=_texts(found["leaving"]),
        stale_since=None if found["stale_since"] is None else _time(found["stale_since"]),
    )


def _tenant(found: dict[str, Any]) -> Tenant:
    _fields(found, Tenant)
    devices = _texts(found["devices"])
    return Tenant(_is(found["key"], int), _is(found["name"], str), _who(found["keeper"]), devices, _pids(found))


def _waiter(found: dict[str, Any]) -> Waiter:
    want = _fields(_fields(found, Waiter)["want"], Want)
    return Waiter(
        ticket=_is(found["ticket"], int),
        id=_is(found["id"], str),
        name=_is(found["name"], str),
        test=_is(found["test"], str),
        broker=_who(found["broker"]),
        since=_time(found["since"]),
        want=Want(_is(want["count"], int), _texts(want["candidates"]), _mib(want["memory_mib"])),
    )


def _who(found: dict[str, Any]) -> Who:
    _fields(found, Who)
    return Who(_is(found["pid"], int), _is(found["start_time"], int), _is(found["namespace"], int))


def _baseline(found: dict[str, Any]) -> Baseline:
    reading = _fields(_fields(found, Baseline)["reading"], Reading)
    processes = reading["processes"]
    if processes is not None:
        # JSON has only texts as names.
        processes = {int(pid): None if held is None else _is(held, int) for pid, held in processes.items()}
    sizes = (_is(reading["used_bytes"], int), _is(reading["total_bytes"], int), _is(reading["version"], int))
    return Baseline(Reading(*sizes, processes), _time(found["taken"]))


def _quarantine(found: dict[str, Any]) -> Quarantine:
    _fields(found, Quarantine)
    return Quarantine(
        reason=_is(found["reason"], str),
        since=_time(found["since"]),
        lease=_is(found["lease"], str),
        pids=_pids(found),
        namespace=_is(found["namespace"], int),
        is_complete=_truth(found["is_complete"]),
    )


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is not a truth")
    return value


def _pids(found: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    return tuple((_is(pid, int), _is(start, int)) for pid, start in _list(found["pids"]))


def _fields(found: dict[str, Any], kind: type[Any]) -> dict[str, Any]:
    # What another version has added would be lost at the next change.
    if found.keys() != _NAMES[kind]:
        raise TypeError(f"{kind.__name__}: {sorted(found.keys() ^ _NAMES[kind])} is missing, or too much")
    return found


def _is(value: Any, kind: type[_Kind]) -> _Kind:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not {kind.__name__}")
    return value


def _list(value: Any) -> list[Any] | tuple[Any, ...]:
    # A text, or the names of an object, could be gone through as well.
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{value!r} is not a list")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(_is(one, str) for one in _list(value))


def _mib(value: Any) -> int | None:
    if value is None:
        return None
    _demand(_is(value, int) > 0, f"{value} MiB are no share")
    return int(value)


def _time(value: Any) -> float:
    time = float(_is(value, int) if not isinstance(value, float) else value)
    _demand(math.isfinite(time), f"{time} is no time")
    return time
