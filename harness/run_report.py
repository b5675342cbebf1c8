"""Brings what `harness.reporting` says of servers into pytest's reports: sections, and a word on a server that died.

One for each run; those of pytester in this process are runs within a test.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from typing import TYPE_CHECKING

import pytest

from harness import journal
from harness.journal import Owner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.reporting.witness import Witness
    from harness.server import Server

_REPORT = pytest.StashKey["RunReport"]()


class ServerDied(pytest.PytestWarning):
    """A server died while a test that did not fail was using it: the tests after it are without."""


class RunReport:
    """What one run knows of the servers that its tests launch. Nothing is loaded before the first of them."""

    def __init__(self) -> None:
        """Begin before the first test."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._witness: Witness | None = None
        self._began = time.monotonic()
        self._shown: set[Server] = set()
        self._owner: Owner | None = None
        journal.listen(self._see)

    def close(self) -> None:
        """See no more launches."""
        journal.unlisten(self._see)

    def _see(self, server: object) -> None:
        with contextlib.suppress(Exception):  # no launch fails for the sake of a report
            self._made_witness().see(server)  # type: ignore[arg-type]  # the journal knows no servers

    def _made_witness(self) -> Witness:
        from harness.reporting.witness import Witness  # noqa: PLC0415 - most runs launch nothing

        with self._lock:  # threads may launch the first ones at the same time
            if self._witness is None:
                self._witness = Witness(self._began)
            return self._witness

    def begin(self, test: str) -> None:
        """Say that a test begins: what is launched from now on is its own."""
        self.end()
        self._owner = Owner(test, "function")
        journal.enter(self._owner)
        self._shown = set()
        self._began = time.monotonic()
        if self._witness is not None:
            self._witness.begin_test()

    def end(self) -> None:
        """Say that the test has ended."""
        if self._owner is not None:
            journal.leave(self._owner)
            self._owner = None

    def sections(self, item: pytest.Item) -> Iterator[tuple[str, str]]:
        """Give a section for each server that a test used, for its report; a log is shown once."""
        if self._witness is None or self._process != os.getpid():
            return
        from harness.reporting.sections import section  # noqa: PLC0415 - as above

        for server in self._witness.used(getattr(item, "fixturenames", ())):
            try:
                made = section(server, self._witness, with_log=server not in self._shown)
            except Exception as error:  # noqa: BLE001 - a mistake here must not end the run
                made = (f"harness: server {server.name!r}", f"no section: {type(error).__name__}: {error}")
            self._shown.add(server)
            yield made

    def warn_of_deaths(self) -> None:
        """Warn of servers of a wider scope that died during this test, which has not failed."""
        if self._witness is None or self._process != os.getpid():
            return
        from harness.reporting.sections import headline  # noqa: PLC0415 - as above

        for server in self._witness.deaths():
            if server not in self._shown:
                self._shown.add(server)
                text = f"server {server.name!r}: {headline(server, self._witness)} (its log: {server.log_path})"
                warnings.warn(ServerDied(text), stacklevel=2)


def start(config: pytest.Config) -> None:
    """Begin the report of a run."""
    report = config.stash[_REPORT] = RunReport()
    config.add_cleanup(report.close)


def of(config: pytest.Config) -> RunReport | None:
    """Give the report of a run; None in a pytest-xdist controller, and where only the fixtures were imported."""
    return config.stash.get(_REPORT, None)


@contextlib.contextmanager
def owner_is(fixture: str, scope: str) -> Iterator[None]:
    """Say that what is launched in here is a fixture's; one of function scope launches for its test."""
    if scope == "function":
        yield
        return
    owner = Owner(fixture, scope)
    journal.enter(owner)
    try:
        yield
    finally:
        journal.leave(owner)
