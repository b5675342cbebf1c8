"""Brings what `harness.reporting` says of servers into pytest's reports of tests: sections, deaths, and what was left.

One for each run; those of pytester in this process are runs within a test.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
import time
from types import CodeType
from typing import TYPE_CHECKING, Any

import pytest

from harness import journal
from harness.errors import HarnessError, Leaked
from harness.journal import Owner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.journal import Event
    from harness.reporting.leaks import Leak
    from harness.reporting.witness import Witness
    from harness.server import Server

_REPORT = pytest.StashKey["RunReport"]()


class ServerDied(pytest.PytestWarning):
    """A server died while a test that did not fail was using it: the tests after it are without."""


class LeakWarning(pytest.PytestWarning):
    """A test, or a fixture of a wider scope, left a server, a lease or a port behind. With --harness-strict: Leaked."""


class RunReport:
    """What one run knows of the servers that its tests launch. Nothing is loaded before the first of them."""

    def __init__(self, *, is_strict: bool) -> None:
        """Begin before the first test; `is_strict` makes leaks errors, and ends what was left."""
        self._process = os.getpid()
        self._is_strict = is_strict
        self._lock = threading.Lock()
        self._witness: Witness | None = None
        self._began = time.monotonic()
        self._shown: set[Server] = set()
        self._owner: Owner | None = None
        self._fixtures: dict[pytest.FixtureDef[Any], Owner] = {}
        self._left: list[Leak] = []
        # Fixtures whose parameter changes are torn down: in a setup, or by `tear_down_outlived`.
        self._are_changing = False
        self.has_failed = False
        """Whether the test that runs has failed, in its setup or its call."""
        self._lacks_a_server = False
        journal.listen(self._see)

    def close(self) -> None:
        """See no more launches."""
        journal.unlisten(self._see)

    def _see(self, event: Event) -> None:
        subject: Any = event.subject  # the journal knows neither servers nor leases
        with contextlib.suppress(Exception):  # no launch fails for the sake of a report
            if event.kind == "launched":
                self._made_witness().see(subject)
            elif event.kind == "not_ready":
                self._lacks_a_server = True
            elif event.kind == "leased":
                self._made_witness().see_lease(subject)

    def _made_witness(self) -> Witness:
        from harness.reporting.witness import Witness  # noqa: PLC0415 - most runs launch nothing

        with self._lock:  # threads may launch the first ones at the same time
            if self._witness is None:
                self._witness = Witness(self._began)
            return self._witness

    def _own_witness(self) -> Witness | None:
        return self._witness if self._process == os.getpid() else None  # a forked child's servers are not its own

    # ---- who owns what is launched

    def begin(self, test: str) -> None:
        """Say that a test begins: what is launched from now on is its own."""
        self.end()
        self._owner = Owner(test, "function")
        journal.enter(self._owner)
        self._shown = set()
        self.has_failed = self._lacks_a_server = False
        self._began = time.monotonic()
        self._are_changing = True
        if self._witness is not None:
            self._witness.begin_test()

    def end(self) -> None:
        """Say that the test has ended: what it has left running is charged to it."""
        owner, self._owner = self._owner, None
        if owner is not None:
            journal.leave(owner)
            self._look(owner)

    def cut_off(self) -> None:
        """Say that the test was cut off, by Ctrl-C or pytest.exit(): its fixtures are torn down with the session."""
        if self._owner is not None:
            journal.leave(self._owner)
            self._owner = None

    def look_at_test(self) -> None:
        """See what the test that is being torn down has left."""
        if self._owner is not None:
            self._look(self._owner)

    @contextlib.contextmanager
    def fixture_set_up(self, fixture: pytest.FixtureDef[Any]) -> Iterator[None]:
        """Say that what is launched in here is a fixture's; one of function scope launches for its test."""
        if fixture.scope == "function":
            yield
            return
        owner = self._fixtures[fixture] = Owner(fixture.argname, fixture.scope)
        # A fixture may hand out a function that launches: those servers are not the tests' that call it.
        journal.own_functions(owner, _nested(getattr(inspect.unwrap(fixture.func), "__code__", None)))
        journal.enter(owner)
        try:
            yield
        finally:
            journal.leave(owner)

    def fixture_failed(self, fixture: pytest.FixtureDef[Any]) -> None:
        """End what a fixture has launched whose setup failed: what would have stopped it is skipped."""
        owner, witness = self._fixtures.get(fixture), self._own_witness()
        if owner is None or witness is None:
            return
        from harness.reporting import leaks  # noqa: PLC0415 - as above

        with contextlib.suppress(OSError, HarnessError):  # its own failure is what is to be read
            leaks.end(leaks.left_by(owner, witness))

    def fixture_torn_down(self, fixture: pytest.FixtureDef[Any]) -> None:
        """Charge what a fixture has left; not at the end of the session, which is the end of all its servers."""
        owner = self._fixtures.pop(fixture, None)
        if owner is not None:
            journal.disown_functions(owner)
        if owner is not None and (owner.scope != "session" or self._are_changing):
            self._look(owner)

    def end_setup(self, item: pytest.Item) -> None:
        """Say that the setup of the test is over; raises as `charge` does."""
        self._are_changing = False
        self.charge(item)

    def tear_down_outlived(self, item: pytest.Item, following: pytest.Item | None) -> None:
        """Tear down the fixtures with servers of which the following test wants another parameter than this one.

        pytest does so in the setup of the following test, which would be charged with what they leave. Raises what the
        first of them raises.
        """
        witness = self._own_witness()
        if witness is None or following is None or not any(map(witness.of, self._fixtures.values())):
            return
        self._are_changing = True
        with contextlib.ExitStack() as teardowns:
            teardowns.callback(self._no_more_changes)
            for fixture in _changed(following):
                teardowns.callback(fixture.finish, item._request)  # type: ignore[attr-defined]  # noqa: SLF001 - as below

    def _no_more_changes(self) -> None:
        self._are_changing = False

    # ---- what was left

    def _look(self, owner: Owner) -> None:
        witness = self._own_witness()
        if witness is None:
            return
        from harness.reporting import leaks  # noqa: PLC0415 - as above

        with contextlib.suppress(OSError, HarnessError):  # a teardown goes on, whatever cannot be read
            found = leaks.left_by(owner, witness)
            for leak in found:
                journal.note("leak", text=leak.text, owner=owner.name, scope=owner.scope)
            self._left += found

    def charge(self, item: pytest.Item) -> None:
        """Warn of what was left, and end it if the test has failed in starting servers; if strict, raise Leaked."""
        left, self._left = self._left, []
        if not left:
            return
        texts = [leak.text for leak in left]
        # Where one server of several did not start, what would stop the others is mostly skipped. After another failure
        # they may be kept by somebody, for later tests.
        has_failed_in_start = self.has_failed and self._lacks_a_server
        if self._is_strict or has_failed_in_start:
            from harness.reporting import leaks  # noqa: PLC0415 - as above

            try:
                leaks.end(left)
            except HarnessError as error:
                texts.append(f"it could not be stopped: {error}")
        if self._is_strict:
            raise Leaked("\n".join(texts))
        if has_failed_in_start:
            texts.append("The test failed after a server of it did not get ready: what it left was stopped.")
        item.warn(LeakWarning("\n".join(texts)))

    # ---- sections and deaths

    def sections(self, item: pytest.Item) -> Iterator[tuple[str, str]]:
        """Give a section for each server that a test used, for its report; a log is shown once."""
        witness = self._own_witness()
        if witness is None:
            return
        from harness.reporting.sections import section  # noqa: PLC0415 - as above

        for server in witness.used(getattr(item, "fixturenames", ())):
            try:
                made = section(server, witness, with_log=server not in self._shown)
            except Exception as error:  # noqa: BLE001 - a mistake here must not end the run
                made = (f"harness: server {server.name!r}", f"no section: {type(error).__name__}: {error}")
            self._shown.add(server)
            yield made

    def warn_of_deaths(self, item: pytest.Item) -> None:
        """Warn of servers of a wider scope that died during this test, which has not failed."""
        witness = self._own_witness()
        if witness is None:
            return
        from harness.reporting.sections import headline  # noqa: PLC0415 - as above

        for server in witness.dead():
            server.note("died")
        for server in witness.deaths():
            if server not in self._shown:
                self._shown.add(server)
                text = f"server {server.name!r}: {headline(server, witness)} (its log: {server.log_path})"
                item.warn(ServerDied(text))


def _nested(code: CodeType | None) -> Iterator[CodeType]:
    for constant in code.co_consts if code is not None else ():
        if isinstance(constant, CodeType):
            yield constant
            yield from _nested(constant)


def _changed(following: pytest.Item) -> list[pytest.FixtureDef[Any]]:
    """Give the fixtures that have a value, but not for the parameter that a test wants; by pytest's own rule."""
    parameters = getattr(getattr(following, "callspec", None), "params", {})
    known = getattr(getattr(following, "_fixtureinfo", None), "name2fixturedefs", {})
    found = []
    for name, wanted in parameters.items():
        fixture = known[name][-1] if known.get(name) else None
        if fixture is None or fixture.scope == "function" or fixture.cached_result is None:
            continue
        if not _is_same(fixture.cached_result[1], wanted):
            found.append(fixture)
    return found


def _is_same(one: object, other: object) -> bool:
    try:
        return bool(one == other)
    except (ValueError, RuntimeError):
        return one is other  # arrays, as pytest has it


def end_test(item: pytest.Item) -> list[Exception]:
    """Say that a test has ended, when it has been torn down; give what it is to fail with."""
    report = of(item.config)
    errors: list[Exception] = []
    if report is None:
        return errors
    report.end()
    with _kept(errors):
        report.charge(item)
    with _kept(errors):
        report.warn_of_deaths(item)
    return errors


@contextlib.contextmanager
def _kept(errors: list[Exception]) -> Iterator[None]:
    try:
        yield
    except (HarnessError, pytest.PytestWarning) as error:  # the second where warnings are errors
        errors.append(error)


def start(config: pytest.Config, *, is_strict: bool) -> None:
    """Begin the report of a run."""
    report = config.stash[_REPORT] = RunReport(is_strict=is_strict)
    config.add_cleanup(report.close)


def of(config: pytest.Config) -> RunReport | None:
    """Give the report of a run; None in a pytest-xdist controller, and where only the fixtures were imported."""
    return config.stash.get(_REPORT, None)
