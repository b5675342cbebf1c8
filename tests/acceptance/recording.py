"""Suites that write down whom they launch: fixtures for inner pytest runs, and what is read of them afterwards.

An inner run has `CONFTEST` as its conftest, and the file's path in the environment. So has every process that it starts
(but no watchdog or keeper, which are written down).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import processes
import pytest

import harness

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.launching import Launcher

PATH = "HARNESS_TEST_RECORD"
TESTS = Path(__file__).parents[1]
CONFTEST = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from acceptance.recording import of_module, own, shared
"""
# What modules of an inner suite begin with.
IMPORTS = """
import os, pathlib, signal, time
import pytest
from acceptance.recording import Record, answers, note, processes, wait_for_note

RECORD = Record(pathlib.Path(os.environ["HARNESS_TEST_RECORD"]))
"""
_HTTP_SERVER = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "{port}"]
_WAIT_S = 60.0


class Up(NamedTuple):
    """A server that was up, who its processes were, and from when until when (monotonic seconds) it was used."""

    name: str
    test: str
    worker: str
    client: int
    pid: int
    ports: list[int]
    people: list[processes.Identity]
    """Its processes, its keeper, its watchdog, and the test process."""
    since: float
    until: float
    left_of_earlier: int
    """How many processes of earlier servers of the same name and test were there when it was launched."""

    @property
    def tree(self) -> list[processes.Identity]:
        """Give its own processes. A keeper says that these are gone, and then ends."""
        return self.people[:-3]


# ---- inside of the run


def note(what: str, **facts: Any) -> None:
    """Write a line down; lines of several processes do not mix."""
    whole = {"what": what, "at": time.monotonic(), "test": os.environ.get("PYTEST_CURRENT_TEST", ""), **facts}
    whole |= {"client": os.getpid(), "worker": os.environ.get("PYTEST_XDIST_WORKER", "")}
    descriptor = os.open(os.environ[PATH], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, (json.dumps(whole) + "\n").encode())
    os.close(descriptor)


def wait_for_note(what: str) -> None:
    """Wait until somebody has written this down."""
    record = Record(Path(os.environ[PATH]))
    processes.wait_for(lambda: bool(record.notes(what)), _WAIT_S, f"note {what!r}")


def is_up(owner: Launcher, watchdog: harness.Watchdog, name: str) -> Iterator[harness.Server]:
    """Launch a server, write it down, give it, and write down that it is not used any more."""
    test = os.environ["PYTEST_CURRENT_TEST"].partition(" ")[0]
    earlier = [up for up in Record(Path(os.environ[PATH])).ups() if (up.name, up.test) == (name, test)]
    left = [who for up in earlier for who in up.tree if processes.is_running(who)]
    server = owner.launch(_HTTP_SERVER, name=name, ports=["more"], ready=harness.http_ok("/"))
    server.wait_ready(timeout_s=_WAIT_S)
    people = [*server.pids(), processes.parent(server.pid), watchdog.pid or 0, os.getpid()]
    facts = {"name": name, "pid": server.pid, "ports": sorted({server.port, *server.ports.values()}), "left": len(left)}
    note("up", people=processes.identities(people), **facts)
    yield server
    note("down", pid=server.pid)


def answers(server: harness.Server) -> bool:
    """Wait until a server of `is_up` answers; it is never False, but an error."""
    processes.wait_for(lambda: harness.http_ok("/")(server), _WAIT_S, f"an answer of {server.name!r}")
    return True


@pytest.fixture
def own(server_group: harness.ServerGroup, watchdog: harness.Watchdog) -> Iterator[harness.Server]:
    """Give a server for the test alone."""
    yield from is_up(server_group, watchdog, "own")


@pytest.fixture(scope="module")
def of_module(watchdog: harness.Watchdog) -> Iterator[harness.Server]:
    """Give the module's server, which is stopped with it."""
    with watchdog.group("module") as group:
        yield from is_up(group, watchdog, "of_module")


@pytest.fixture(scope="session")
def shared(watchdog: harness.Watchdog) -> Iterator[harness.Server]:
    """Give the test process's server."""
    yield from is_up(watchdog, watchdog, "shared")


# ---- afterwards


class Record:
    """What a run has written down."""

    def __init__(self, path: Path) -> None:
        """Take the file; it may not be there yet."""
        self._path = path

    def mark(self, name: str) -> None:
        """Make a file beside the record, which the suite looks for."""
        self._path.with_name(name).touch()

    def is_marked(self, name: str) -> bool:
        """Say whether `mark` has been called."""
        return self._path.with_name(name).exists()

    def notes(self, what: str) -> list[dict[str, Any]]:
        """Give the lines of one kind."""
        if not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [line for line in found if line["what"] == what]

    def ups(self) -> list[Up]:
        """Give every server that has been ready, in that order."""
        ends = {(down["client"], down["pid"]): down["at"] for down in self.notes("down")}
        return [
            Up(
                name=up["name"],
                test=up["test"].partition(" ")[0],
                worker=up["worker"],
                client=up["client"],
                pid=up["pid"],
                ports=up["ports"],
                people=[processes.Identity(*who) for who in up["people"]],
                since=up["at"],
                until=ends.get((up["client"], up["pid"]), up["at"]),
                left_of_earlier=up["left"],
            )
            for up in self.notes("up")
        ]

    def check(self, servers: int | None = None, *, timeout_s: float = 0.0) -> list[Up]:
        """Check that nothing of the run is left, and that no port was two servers' at a time; give the servers.

        It must have been so many `servers`, if that is known. `timeout_s`: for what a crash leaves to watchdogs.
        """
        ups = self.ups()
        assert ups
        assert servers in (None, len(ups))
        processes.wait_gone((who for up in ups for who in up.people), timeout_s)
        marked = processes.marked(f"{PATH}={self._path}")
        assert not marked, processes.describe(marked)
        for number, one in enumerate(ups):
            for other in ups[number + 1 :]:
                if one.since <= other.until and other.since <= one.until:
                    assert not set(one.ports) & set(other.ports), (one, other)
        return ups
