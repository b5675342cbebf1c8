"""Takes and gives back ports, and writes down who had which when.

Run with `python -I -S port_picker.py KIND RECORD PICKS SEED`. KIND is `holds` (as the watchdog does it), `free` (as
most test suites do it: bind, look at the number, close), or `stranger` (binds any port and connects, in every way, and
holds each for a moment, until it is ended). It says `ready`, and begins when it gets a line. A line of RECORD is:
nanoseconds (monotonic), take or give, KIND, pid, port.
"""

from __future__ import annotations

import os
import random
import socket
import sys
import time
from itertools import count, product
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

sys.path.insert(0, str(Path(__file__).parents[2]))

from harness.watchdog.ports import PortHolds

if TYPE_CHECKING:
    from collections.abc import Iterable

_MOST_LAUNCHES = 25
_MOST_OF_STRANGER = 10
_LOOPBACK = {"127.0.0.1", "::1"}


def exists(family: socket.AddressFamily, address: str) -> bool:
    try:
        listening(family, address).close()
    except OSError:
        return False
    return True


def listening(family: socket.AddressFamily, address: str) -> socket.socket:
    listener = socket.socket(family)
    listener.bind((address, 0))
    listener.listen()
    return listener


_IPV4 = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0")]  # noqa: S104 - what a stranger may do
_IPV6 = [(socket.AF_INET6, "::1"), (socket.AF_INET6, "::")] if exists(socket.AF_INET6, "::1") else []
_ADDRESSES = [*_IPV4, *_IPV6]
_OPTIONS = [[], [socket.SO_REUSEADDR], [socket.SO_REUSEPORT], [socket.SO_REUSEADDR, socket.SO_REUSEPORT]]


class Picked(Protocol):
    """The ports of one launch."""

    ports: dict[str, int]

    def close(self) -> None:
        """Give them back."""


class FreePorts:
    """Ports that nobody had a moment ago."""

    def __init__(self, names: list[str]) -> None:
        self.ports = {}
        for name in names:
            with socket.socket() as asked:
                asked.bind(("127.0.0.1", 0))
                self.ports[name] = asked.getsockname()[1]

    def close(self) -> None:
        pass


class Record:
    """The common record: lines of several processes do not mix."""

    def __init__(self, path: str, kind: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._who = f"{kind} {os.getpid()}"

    def write(self, what: str, ports: Iterable[int]) -> None:
        now = time.monotonic_ns()
        lines = [f"{now} {what} {self._who} {port}\n" for port in ports]
        os.write(self._descriptor, "".join(lines).encode())


def pick(kind: type[PortHolds | FreePorts], record: Record, picks: int, chance: random.Random) -> None:
    """Take ports as for so many launches, of which some are there at a time."""
    held: list[Picked] = []

    def give(number: int) -> None:
        given = held.pop(number)
        record.write("give", given.ports.values())
        given.close()

    for _ in range(picks):
        held.append(kind(["", "a", "b"][: chance.randint(1, 3)]))
        record.write("take", held[-1].ports.values())
        while len(held) > chance.randint(0, _MOST_LAUNCHES):
            give(chance.randrange(len(held)))
    while held:
        give(0)


def disturb(record: Record) -> NoReturn:
    """Take any port over and over, in every way that the kernel has."""
    listeners = {family: listening(family, address) for family, address in _ADDRESSES if address in _LOOPBACK}
    held: list[socket.socket] = []
    for number, ((family, address), options) in zip(count(), endless(), strict=False):
        taken = socket.socket(family)
        for option in options:
            taken.setsockopt(socket.SOL_SOCKET, option, 1)
        if number % 5 == 0:
            taken.connect(listeners[family].getsockname())
            listeners[family].accept()[0].close()
        else:
            taken.bind((address, 0))
        record.write("take", [taken.getsockname()[1]])
        held.append(taken)
        if len(held) > _MOST_OF_STRANGER:
            record.write("give", [held[0].getsockname()[1]])
            held.pop(0).close()
    raise AssertionError


def endless() -> Iterable[tuple[tuple[socket.AddressFamily, str], list[int]]]:
    while True:
        yield from product(_ADDRESSES, _OPTIONS)


def main() -> None:
    kind, path, picks, seed = sys.argv[1:]
    record = Record(path, kind)
    print("ready", flush=True)  # noqa: T201 - to the test
    sys.stdin.readline()
    if kind == "stranger":
        disturb(record)
    pick(PortHolds if kind == "holds" else FreePorts, record, int(picks), random.Random(int(seed)))  # noqa: S311


if __name__ == "__main__":
    main()
