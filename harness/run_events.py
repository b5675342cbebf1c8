"""What people see of a whole run: progress, followed logs, the summary, JUnit's properties, `--harness-report`.

A plain run takes the events of its own journal. Under pytest-xdist each worker writes them to a file, and the
controller reads these. Little is loaded before the first event.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness import journal, session, state_dir
from harness.errors import HarnessError

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.journal import Event
    from harness.reporting.events import Fields
    from harness.reporting.following import Follower
    from harness.reporting.parts import Parts
    from harness.reporting.progress import Progress
    from harness.reporting.report_file import ReportFile
    from harness.reporting.summary import Summary

_RECORDER = pytest.StashKey["Recorder"]()
_RUN = pytest.StashKey["RunEvents"]()
# How long an event of a worker may take to be seen.
_LOOK_S = 0.25
# What went wrong so often is read in the report.
_MOST_LINES = 20


class Recorder:
    """Takes the events of this process's journal, for those who want them as JSON."""

    def __init__(self, worker: str, take: Callable[[Fields], None]) -> None:
        """Take the worker's name, "" without pytest-xdist, and who gets the events."""
        self._worker = worker
        self._take = take
        self._clock_offset_s = time.time() - time.monotonic()
        self.test = ""
        journal.listen(self._see)

    def _see(self, event: Event) -> None:
        from harness.reporting.events import Source, fields  # noqa: PLC0415 - most runs have no event

        with contextlib.suppress(Exception):  # no launch fails for the sake of a report
            self._take(fields(event, Source(self._worker, os.getpid(), self.test), self._clock_offset_s))

    def close(self) -> None:
        """Take no more."""
        journal.unlisten(self._see)


class RunEvents:
    """The events of a run, where it has its terminal: in a plain run, or in pytest-xdist's controller."""

    def __init__(self, report: ReportFile | None) -> None:
        """Take the report to write, if one is wanted."""
        self._process = os.getpid()
        self._lock = threading.RLock()  # a signal handler may stop servers while this thread is in `take`
        self._events: list[Fields] = []
        self._report = report
        self._progress: Progress | None = None
        self._follower: Follower | None = None
        self._reader: _Reader | None = None
        self._is_concluded = False

    def take(self, event: Fields) -> None:
        """Take an event, from any thread."""
        from harness.reporting.events import PASSING  # noqa: PLC0415 - as above

        if os.getpid() != self._process:
            return  # a forked child: another thread may have held the lock, and nobody reads what it keeps
        with self._lock:
            if event["event"] in PASSING:
                if self._progress is not None:
                    self._progress.take(event)
                return
            self._events.append(event)
            if self._report is not None:
                self._report.add(event)
            self._follow(event)

    def _follow(self, event: Fields) -> None:
        if self._follower is not None and event["event"] == "launched" and event["log"] != os.devnull:
            worker = f"{event['worker']} " if event["worker"] else ""
            self._follower.follow(worker + event["server"], Path(event["log"]))

    def show(self, progress: Progress | None, follower: Follower | None) -> None:
        """Show progress and logs from now on."""
        with self._lock:
            self._progress, self._follower = progress, follower
            for event in self._events:
                self._follow(event)

    def begin(self) -> None:
        """Begin to write the report: an earlier one stays where tests are only collected."""
        with self._lock:
            if self._report is not None:
                self._report.begin(self._events)

    def read_workers(self, run: Path) -> None:
        """Take the events of pytest-xdist's workers as they come."""
        self._reader = _Reader(run, self.take, self.forget_stale)

    def forget_stale(self) -> None:
        """Show no longer what a process waited for that has died."""
        with self._lock:
            if self._progress is not None:
                self._progress.forget_stale(time.monotonic())

    def make_room(self) -> None:
        """Take the moving line away: pytest is about to write."""
        if self._progress is not None and os.getpid() == self._process:
            with self._lock:
                self._progress.make_room()

    def end_of_tests(self) -> None:
        """Say that nothing is launched or stopped any more."""
        if self._process != os.getpid():
            return
        if self._reader is not None:
            self._reader.close()
        with self._lock:
            if self._progress is not None:
                self._progress.close()
            follower, self._follower = self._follower, None
        if follower is not None:
            follower.close()  # it may take seconds, for which no other thread's stop is to wait

    def summary(self) -> Summary:
        """Give what the events amount to up to now."""
        from harness.reporting import events, summary  # noqa: PLC0415 - as above

        if self._reader is not None:
            self._reader.look()
        with self._lock:
            return summary.summarise(events.merged(self._events))

    @property
    def has_events(self) -> bool:
        """Say whether anything has happened."""
        if self._reader is not None:
            self._reader.look()
        return bool(self._events)

    def conclude(self) -> str:
        """Write the report in order; give why that cannot be done, "" if it could."""
        if self._is_concluded or self._report is None or self._process != os.getpid():
            return ""  # a forked child that leaves through pytest writes no second one
        from harness.reporting import events  # noqa: PLC0415 - as above

        self._is_concluded = True
        self.end_of_tests()
        try:
            self._report.finish([*events.merged(self._events), self.summary().as_event()])
        except OSError as error:
            return f"cannot write {self._report}: {error.strerror}"
        return ""


class _Reader:
    """Reads the workers' files in a thread of its own: the controller waits for them in the main thread."""

    def __init__(self, run: Path, take: Callable[[Fields], None], look_after: Callable[[], None]) -> None:
        self._run = run
        self._take = take
        self._look_after = look_after
        self._lock = threading.Lock()
        self._parts: Parts | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._read, name="harness events", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._is_over.wait(_LOOK_S):
            self.look()
            self._look_after()

    def look(self) -> None:
        """Take what has come."""
        with self._lock:
            if self._parts is None:
                if not self._run.exists():
                    return
                from harness.reporting.parts import Parts  # noqa: PLC0415 - as above

                self._parts = Parts(self._run)
            for event in self._parts.new():
                with contextlib.suppress(Exception):  # what one says must not hide what the others do
                    self._take(event)

    def close(self) -> None:
        """Take what has come, and remove the files."""
        if self._is_over.is_set():
            return
        self._is_over.set()
        self._thread.join()
        self.look()
        if self._parts is not None:
            self._parts.remove()


# ---- pytest


def start(config: pytest.Config) -> None:
    """Begin to take events; raises pytest.UsageError if the report cannot be written."""
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        _start_worker(config, str(worker.get("workerid", "")))
        return
    run = config.stash[_RUN] = RunEvents(_report_file(config))
    config.add_cleanup(lambda: _conclude(config))
    if not session.is_controller(config):
        _record(config, "", run.take)


def _record(config: pytest.Config, worker: str, take: Callable[[Fields], None]) -> None:
    recorder = config.stash[_RECORDER] = Recorder(worker, take)
    config.add_cleanup(recorder.close)


def _start_worker(config: pytest.Config, worker: str) -> None:
    controller = session.controller_of(config)
    if controller is None:
        return  # on another host: nobody reads what it says

    try:
        run = state_dir.run_of(controller)  # now: a test may change where the state directory is
    except HarnessError:
        return  # the tests say so

    def take(event: Fields) -> None:
        from harness.reporting.parts import Part  # noqa: PLC0415 - as above

        Part(run).add(event)

    _record(config, worker, take)


def _report_file(config: pytest.Config) -> ReportFile | None:
    path = session.path_of(config, "harness_report")
    if path is None:
        return None
    from harness.reporting.report_file import ReportFile  # noqa: PLC0415 - as above

    try:
        return ReportFile(path)
    except OSError as error:
        raise pytest.UsageError(f"--harness-report: cannot write {path}: {error.strerror}") from None


def session_starts(config: pytest.Config) -> None:
    """Show what is to be shown while the run goes on: pytest's terminal is there now, and nothing is captured."""
    run = config.stash.get(_RUN, None)
    if run is None:
        return
    if config.getoption("collectonly", default=False):
        return
    run.begin()
    if session.is_controller(config):
        with contextlib.suppress(HarnessError):  # a bad state directory: the tests say so
            run.read_workers(state_dir.run_of(os.getpid()))
    run.show(_progress(config), _follower(config))
    config.pluginmanager.register(_MakeRoom(run))


def _progress(config: pytest.Config) -> Progress | None:
    if _verbosity(config) < 0 or not config.pluginmanager.has_plugin("terminalreporter"):
        return None
    from harness.reporting.progress import Progress, Screen  # noqa: PLC0415 - as above

    try:
        screen = Screen(os.dup(1))
    except OSError:
        return None  # it is closed
    config.add_cleanup(screen.close)
    return Progress(screen)


def _verbosity(config: pytest.Config) -> int:
    return int(getattr(config.option, "verbose", 0))  # without pytest's terminal plugin there is no such option


def _follower(config: pytest.Config) -> Follower | None:
    if not (session.flag(config, "harness_live_logs") or config.getoption("capture", None) == "no"):
        return None
    from harness.reporting.following import Follower  # noqa: PLC0415 - as above

    with_colour = config.pluginmanager.has_plugin("terminalreporter") and config.get_terminal_writer().hasmarkup
    follower = Follower(1, with_colour=with_colour)
    config.add_cleanup(follower.close)
    return follower


def test_is(config: pytest.Config, test: str) -> None:
    """Say which test runs, "" for none."""
    if _RECORDER in config.stash:
        config.stash[_RECORDER].test = test


def add_properties(config: pytest.Config) -> None:
    """Give JUnit's file the numbers of the run: before it is written, which is when the session ends."""
    run = config.stash.get(_RUN, None)
    xml = _junit(config)
    if run is None or xml is None:
        return
    _end_workers(config)
    if run.has_events:
        for name, value in run.summary().numbers().items():
            xml.add_global_property(name, value)


def _junit(config: pytest.Config) -> Any:
    from _pytest.junitxml import xml_key  # noqa: PLC0415 - as record_testsuite_property does; it has no public name

    return config.stash.get(xml_key, None)


def _end_workers(config: pytest.Config) -> None:
    # After -x they still stop their servers; pytest-xdist waits for them next, but in the same hook as JUnit writes.
    manager = getattr(config.pluginmanager.get_plugin("dsession"), "nodemanager", None)
    if manager is not None:
        manager.teardown_nodes()


class _MakeRoom:
    """A plugin of this run, since these hooks do not say of which run they are."""

    def __init__(self, run: RunEvents) -> None:
        self._run = run

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        """Let pytest write where the moving line is."""
        self._run.make_room()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self) -> None:
        """Let pytest write where the moving line is."""
        self._run.make_room()


def end_of_tests(config: pytest.Config) -> None:
    """Say that nothing is launched or stopped any more."""
    if _RUN in config.stash:
        config.stash[_RUN].end_of_tests()


def _conclude(config: pytest.Config) -> None:
    if problem := config.stash[_RUN].conclude():
        import sys  # noqa: PLC0415 - hardly ever

        sys.stderr.write(f"harness: {problem}\n")


def print_summary(terminal: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print one line when all is well, and what was not in full; under -q only the latter."""
    run = config.stash.get(_RUN, None)
    if run is None or not run.has_events:
        return
    found = run.summary()
    if found.is_well and _verbosity(config) <= 0:
        if _verbosity(config) == 0 and found.launched:
            terminal.write_line(f"harness: {found.line()}")
    elif found.launched or found.leaks:
        terminal.section("harness: servers", sep="=")
        for line in found.lines(_MOST_LINES):
            terminal.write_line(line)
