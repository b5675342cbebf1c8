"""The pytest plugin: options, and one watchdog for each process that runs tests."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import pytest

from harness import current, run_events, run_report, session
from harness.errors import GpuNotReleased, Leaked
from harness.fixtures import server_group, watchdog
from harness.session import end_test

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from pluggy import Result

    from harness.client import Watchdog

__all__ = ["server_group", "watchdog"]

_FORCED = pytest.StashKey[BaseException]()
_LEFT_BEHIND = "harness: what servers left behind"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, each with an ini name in underscores."""
    group = parser.getgroup("harness", "servers owned by a watchdog")
    group.addoption(
        "--harness-log-dir",
        metavar="DIR",
        help="keep the servers' logs in DIR (ini: harness_log_dir). By default they are in the state directory, and are"
        " removed a day after the run.",
    )
    group.addoption(
        "--harness-deadline",
        metavar="S",
        help="a test that has run for S seconds, its fixtures included, is taken for hung (ini: harness_deadline): its"
        " servers are stopped, it fails with the stacks of all threads, and a process that does not react is ended",
    )
    group.addoption(
        "--harness-strict",
        action="store_true",
        help="a server, a lease of GPUs or a port that a test or a fixture leaves behind is an error at teardown, and"
        " is ended (ini: harness_strict); otherwise it is a warning",
    )
    group.addoption(
        "--harness-live-logs",
        action="store_true",
        help="show what servers write while tests run, as -s does (ini: harness_live_logs)",
    )
    group.addoption(
        "--harness-report",
        metavar="PATH",
        help="write every event of every server to PATH, as lines of JSON (ini: harness_report)",
    )
    _add_settings(parser)


def _add_settings(parser: pytest.Parser) -> None:
    parser.addini("harness_strict", "leaks of single tests are errors", type="bool")
    parser.addini("harness_live_logs", "show what servers write while tests run", type="bool")
    parser.addini("harness_report", "write every event of every server to this file")
    parser.addini("harness_log_dir", "keep the servers' logs in this directory")
    parser.addini("harness_deadline", "seconds after which a test is taken for hung (default: never)")
    parser.addini(
        "harness_deadline_grace_s",
        "seconds between a test's deadline and the end of its process, if the test still runs (default: 30.0)",
    )
    parser.addini("harness_gpu_wait_s", "seconds that a launch waits at most for its GPUs (default: 1800.0)")
    parser.addini(
        "harness_gpu_release_s",
        "seconds that the GPU memory of a stopped server may take to come back (default: 60.0); then the test that"
        " stopped it fails, and the device is given to nobody until the memory is back",
    )
    parser.addini(
        "harness_crash_grace_s",
        "seconds between asking and killing each server when the test process has died (default: 5.0)",
        default="5.0",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Fork the watchdog early, while this process is small; not in a pytest-xdist controller, which runs no test."""
    config.addinivalue_line(
        "markers",
        "harness_deadline(seconds): take the test for hung after this time, its fixtures included (None: never)",
    )
    config.addinivalue_line(
        "markers",
        "gpus(n): the fixture server_group leases n GPUs (or those in a list of UUIDs and indexes); the test is skipped"
        " where this machine has too few",
    )
    session.check_times(config)
    run_events.start(config)
    if not session.is_controller(config):
        session.keep_stderr(config)
        session.start(config)
        _be_current(config)
        run_report.start(config, is_strict=session.flag(config, "harness_strict"))


def _be_current(config: pytest.Config) -> None:
    def source() -> Watchdog:
        return session.watchdog_of(config)

    current.use(source)
    config.add_cleanup(lambda: current.use_no_more(source))


def pytest_plugin_registered(plugin: object) -> None:
    """Import everything early where there is pytester, whose in-process runs forget each module that they imported.

    Half of this package would be there twice otherwise: the part that such a run was the first to need.
    """
    if getattr(plugin, "__name__", "") == "_pytest.pytester":
        session.import_all()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a pytest-xdist worker who its controller is: its servers are stopped when either of the two ends."""
    node.workerinput[session.CONTROLLER] = os.getpid()


@pytest.hookimpl(hookwrapper=True, trylast=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Result[None], None]:
    """Say that the test begins: here, since plugins that repeat a test repeat this."""
    report = run_report.of(item.config)
    if report is not None:
        report.begin(item.nodeid)
    run_events.test_is(item.config, item.nodeid)
    session.begin_test(item)
    with _phase(item):
        outcome = yield
    if report is not None:
        _carry_out(lambda: report.end_setup(item), outcome)


def _carry_out(step: Callable[[], None], outcome: Result[None]) -> None:
    try:
        step()
    except BaseException as error:  # noqa: BLE001 - pytest must get it as the outcome, Ctrl-C too
        if outcome.exception is None or not isinstance(error, Exception):
            outcome.force_exception(error)


@pytest.hookimpl(hookwrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, Result[None], None]:
    """Know whose it is what a fixture launches that outlives the test."""
    report = run_report.of(request.config)
    with contextlib.nullcontext() if report is None else report.fixture_set_up(fixturedef):
        outcome = yield
    if report is not None and outcome.exception is not None:
        report.fixture_failed(fixturedef)


def pytest_fixture_post_finalizer(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> None:
    """See what such a fixture has left."""
    report = run_report.of(request.config)
    if report is not None:
        report.fixture_torn_down(fixturedef)


@pytest.hookimpl(hookwrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Result[None], None]:
    """Fail the test at once if its deadline passed where it could not be interrupted."""
    watch = session.watched_test(item.config)
    if watch is not None and watch.is_unreported:
        raise watch.failure()
    with _phase(item):
        outcome = yield
    if isinstance(outcome.exception, (GpuNotReleased, Leaked)):
        leak = session.unreported_leak(item.config)  # so that its teardown does not say it again
        if leak is not None and str(leak) != str(outcome.exception):
            item.add_report_section("call", _LEFT_BEHIND, str(leak))
    if watch is not None and watch.is_unreported and outcome.exception is None:
        outcome.force_exception(watch.failure())


@pytest.hookimpl(hookwrapper=True, trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, Result[None], None]:
    """Say that the test has ended. What is torn down is torn down, also after the deadline."""
    report = run_report.of(item.config)
    with _phase(item):
        outcome = yield
        if report is not None:
            _carry_out(lambda: report.tear_down_outlived(item, nextitem), outcome)
    end_test(item.config)
    errors: list[Exception] = []
    _carry_out(lambda: errors.extend(run_report.end_test(item)), outcome)  # a time limit may strike here too
    run_events.test_is(item.config, "")
    leak = session.unreported_leak(item.config)
    for error in [*errors, *([leak] if leak is not None else [])]:
        if outcome.exception is None:
            item.stash[_FORCED] = error
            outcome.force_exception(error)
        elif str(error) != str(outcome.exception):
            item.add_report_section("teardown", _LEFT_BEHIND, str(error))
    watch = session.watched_test(item.config)
    if watch is not None and watch.is_unreported and outcome.exception is None:
        outcome.force_exception(watch.failure())


def _phase(item: pytest.Item) -> contextlib.AbstractContextManager[None]:
    watch = session.watched_test(item.config)
    return watch.phase() if watch is not None else contextlib.nullcontext()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Result[pytest.TestReport], None]:
    """Show the servers in the report of a test that failed, and the stacks in that of one that hung."""
    outcome = yield
    report = run_report.of(item.config)
    if report is not None and outcome.get_result().failed:
        report.has_failed = True
    if call.excinfo is not None and call.excinfo.value is item.stash.get(_FORCED, None):
        outcome.get_result().longrepr = call.excinfo.getrepr(style="value")  # a traceback would show pytest's own lines
    if report is not None and outcome.get_result().failed:
        outcome.get_result().sections.extend(report.sections(item))
    watch = session.watched_test(item.config)
    if watch is not None and watch.is_overdue and not outcome.get_result().passed:
        watch.is_reported = True
        outcome.get_result().sections.append(watch.section())


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Show progress and logs from now on."""
    run_events.session_starts(session.config)


@pytest.hookimpl(hookwrapper=True, trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, Result[None], None]:
    """End a test that Ctrl-C or pytest.exit() has ended without a teardown of its own: its deadline is over."""
    end_test(session.config)
    report = run_report.of(session.config)
    if report is not None:
        report.cut_off()
    run_events.add_properties(session.config)
    yield
    run_events.end_of_tests(session.config)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what became of all servers."""
    run_events.print_summary(terminalreporter, config)


def pytest_enter_pdb(config: pytest.Config) -> None:
    """Let no deadline pass while a person debugs: pytest says so for --pdb, --trace, breakpoint() and pdb.set_trace."""
    watch = session.watched_test(config)
    if watch is not None:
        watch.hold(is_held=True)


def pytest_leave_pdb(config: pytest.Config) -> None:
    """Let deadlines pass again."""
    watch = session.watched_test(config)
    if watch is not None:
        watch.hold(is_held=False)


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str, report: pytest.TestReport) -> None:
    """Say in the report of a test during which a pytest-xdist worker ended that its watchdog did it, and why."""
    text = session.hung_text(crashitem)
    if text:
        report.sections.append(("harness: why the worker was ended", text))
