"""Tests that hang: the test process's part of what the watchdog does about them.

The watchdog counts the time, since a hung process cannot. At the deadline it sends a signal to this process. Two things
answer it: faulthandler, in C and without the GIL, writes the stacks of all threads to a file; and, once Python code can
run, `TestWatch` fails the test, or says that a debugger is at work.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import hashlib
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from harness import messages, private, specs
from harness.errors import HarnessError, SpecError, WatchdogDied
from harness.stacks import readable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import FrameType

    from harness.link import Link

DEFAULT_GRACE_S = 30.0
# A realtime signal (signal(7)): no signal of the C library, of Python or of pytest-timeout.
_SIGNAL = getattr(signal, "SIGRTMIN", 0) + 17  # elsewhere no watchdog can be started
_PR_SET_PTRACER = 0x59616D61  # prctl(2)
# The first part of the name of a module whose code traces, or waits for a person, in a process that is being debugged.
_DEBUGGERS = frozenset({"bdb", "pdb", "pydevd", "_pydevd_bundle", "_pydevd_frame_eval", "debugpy", "ipdb", "pudb"})

_MOST_STACK_BYTES = 1 << 18
_SECTION = "harness: stacks at the deadline"

# In-process runs of pytester are sessions within a test: the innermost has the signal.
_watches: list[TestWatch] = []


def report_path(run: Path, test: str) -> Path:
    """Give the file in a run's directory in which the watchdog says why it has ended the process of a test."""
    return run / f"hung-{hashlib.sha256(test.encode(errors='replace')).hexdigest()[:16]}.txt"


def deadline_of(item: pytest.Item, default_s: float | None) -> float | None:
    """Give a test's deadline in seconds: its marker's, else the default; raises SpecError for a wrong marker."""
    marker = item.get_closest_marker("harness_deadline")
    if marker is None:
        return default_s
    given = [*marker.args, *([marker.kwargs["seconds"]] if "seconds" in marker.kwargs else [])]
    if len(given) != 1 or len(marker.args) + len(marker.kwargs) != 1:
        raise SpecError("@pytest.mark.harness_deadline takes one number of seconds, or None for no deadline")
    return specs.optional_seconds(given[0], "harness_deadline")


class TestWatch:
    """Tells the watchdog which test runs, and answers its signal."""

    __test__ = False

    def __init__(self, link: Link, run: Path, reports: Path, *, grace_s: float, stderr: int) -> None:
        """Take the connection, the directories for stacks and reports, and this process's real standard error."""
        self._link = link
        self._owner = os.getpid()
        self._lost: WatchdogDied | None = None
        self._reports = reports
        self._grace_s = grace_s
        self._stderr = stderr
        self._reason = ""
        self._name = ""
        self._may_raise = False
        self._has_raised = False
        self.is_reported = False
        self._stacks_path = run / "stacks.txt"
        try:
            self._stacks = private.open_file(str(self._stacks_path), os.O_RDWR | os.O_CREAT | os.O_APPEND)
            self._test = private.open_file(str(run / private.TEST_FILE), os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise HarnessError(f"cannot make a file in {run}: {error.strerror}") from None
        self._is_interruptible = False
        self._listen()
        _watches.append(self)
        # Where Yama restricts ptrace(2), and pidfd_getfd(2) with it: to write to this process's standard error.
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, link.pid, 0, 0, 0)

    def _listen(self) -> None:
        # A watchdog may be asked for first by a thread of the test: the next test's beginning does the rest.
        self._is_interruptible = threading.current_thread() is threading.main_thread()
        if self._is_interruptible:
            signal.signal(_SIGNAL, self._on_signal)
        faulthandler.register(_SIGNAL, file=self._stacks, all_threads=True, chain=self._is_interruptible)

    def close(self) -> None:
        """Answer no signal any more."""
        _watches.remove(self)
        # Between here and the end of this function the signal would end the process: no test is watched any more.
        faulthandler.unregister(_SIGNAL)
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(_SIGNAL, signal.SIG_DFL)
        if _watches:
            _watches[-1]._listen()  # noqa: SLF001 - of the same class
            _watches[-1]._note(_watches[-1]._name)  # noqa: SLF001 - they share the file
        os.close(self._stacks)
        os.close(self._test)

    # ---- what the test process tells

    def begin(self, test: str, deadline_s: float | None) -> None:
        """Say that a test begins; raises WatchdogDied if nobody is there to watch its deadline."""
        if not self._is_interruptible:
            self._listen()
        self.forget()
        os.ftruncate(self._stacks, 0)
        self._note(test)
        if deadline_s is not None and _is_traced():
            deadline_s = None
        report = report_path(self._reports, test)
        begin = messages.BeginTest(
            test, deadline_s, self._grace_s, _SIGNAL, str(self._stacks_path), str(report), self._stderr
        )
        with contextlib.nullcontext() if deadline_s is not None else contextlib.suppress(WatchdogDied):
            self._tell(begin)

    def _note(self, test: str) -> None:
        self._name = test
        with contextlib.suppress(OSError):  # a full disk; it is for `python -m harness ps` alone
            os.ftruncate(self._test, 0)
            os.pwrite(self._test, test.encode(errors="replace")[: private.LONGEST_TEST], 0)

    def forget(self) -> None:
        """Know nothing of an earlier test any more."""
        self._reason = ""
        self._has_raised = self.is_reported = False

    def end(self) -> None:
        """Say that the test has ended; a watchdog that has died needs not know."""
        self._note("")
        with contextlib.suppress(WatchdogDied):
            self._tell(messages.EndTest())

    def hold(self, *, is_held: bool) -> None:
        """Say that a debugger has begun or ended its work."""
        with contextlib.suppress(WatchdogDied):
            self._tell(messages.HoldTest(is_held))

    def _tell(self, request: messages.Request) -> None:
        # A test in a forked child (pytest-forked) has no watchdog, and a watchdog that is stopped answers nobody.
        if self._link.is_closed or self._owner != os.getpid():
            return
        if self._lost is not None:
            raise self._lost
        try:
            self._link.request(request, messages.Done)
        except WatchdogDied as error:
            self._lost = error
            raise

    # ---- the signal

    def _on_signal(self, _signal: int, frame: FrameType | None) -> None:
        __tracebackhide__ = True
        if self._owner != os.getpid():
            return
        try:
            seen = messages.InterruptSeen(_is_debugging(frame))
            self._reason = self._link.request(seen, messages.Overdue).reason
        except HarnessError:
            return
        if self._reason and self._may_raise and not self._has_raised:
            raise self.failure()

    @property
    def is_unreported(self) -> bool:
        """Say whether the test was taken for hung and no report says so: it may have caught what was raised."""
        return bool(self._reason) and not self.is_reported

    @property
    def is_overdue(self) -> bool:
        """Say whether the test was taken for hung."""
        return bool(self._reason)

    def failure(self) -> BaseException:
        """Give what the hung test fails with."""
        self._has_raised = True
        return pytest.fail.Exception(f"this test hangs: {self._reason}", pytrace=self._may_raise)

    @contextlib.contextmanager
    def phase(self) -> Iterator[None]:
        """Let the signal raise in here: pytest takes what is raised for the test's failure."""
        self._may_raise = True
        try:
            yield
        finally:
            self._may_raise = False

    def section(self) -> tuple[str, str]:
        """Give the stacks as a section of the test's report."""
        stacks = os.pread(self._stacks, _MOST_STACK_BYTES, 0)  # a cleaner may have removed the file
        return (_SECTION, readable(stacks.decode(errors="replace")))


def _is_traced() -> bool:
    trace = sys.gettrace()
    named = getattr(trace, "__module__", None) or type(trace).__module__
    if trace is not None and str(named).split(".", 1)[0] in _DEBUGGERS:
        return True
    monitoring = getattr(sys, "monitoring", None)  # Python 3.12: debuggers may use it in place of settrace
    return monitoring is not None and monitoring.get_tool(monitoring.DEBUGGER_ID) is not None


def _is_debugging(frame: FrameType | None) -> bool:
    while frame is not None:
        if str(frame.f_globals.get("__name__")).split(".", 1)[0] in _DEBUGGERS:
            return True
        frame = frame.f_back
    return _is_traced()
