"""The one watchdog of a pytest process: forked early, kept in pytest's config, closed at its end.

Most runs, and all xdist controllers, use no server. So only what the fork needs is imported early; the rest of the
client is imported when the first test asks for a watchdog.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from harness import platform, state_dir
from harness.errors import HarnessError, WatchdogDied
from harness.forking import WatchdogProcess

if TYPE_CHECKING:
    from pathlib import Path

    from harness.client import Watchdog
    from harness.hung_tests import TestWatch
    from harness.server import Server

_DEFAULT_CRASH_GRACE_S = 5.0
_WATCHDOG = pytest.StashKey["Watchdog"]()
_FORKED = pytest.StashKey[tuple[WatchdogProcess, "Path"]]()
_FAILURE = pytest.StashKey[HarnessError]()
_TESTS = pytest.StashKey["TestWatch"]()
_STDERR = pytest.StashKey[int]()
_CURRENT = pytest.StashKey[str]()
_UNREPORTED = pytest.StashKey[list["Server"]]()
_SEEN = pytest.StashKey[int]()
# Threads of a test may ask for the watchdog at the same time, and one that asks may be interrupted by another asking.
_asking = threading.RLock()


def _begin_anew() -> None:
    global _asking  # noqa: PLW0603 - it may be held by a thread that is not here
    _asking = threading.RLock()


if hasattr(os, "register_at_fork"):  # elsewhere nothing can be forked
    os.register_at_fork(after_in_child=_begin_anew)

# The key under which the controller tells its workers its pid.
CONTROLLER = "harness_controller"


def start(config: pytest.Config) -> None:
    """Fork the watchdog; what prevents it is raised only where a test needs a watchdog."""
    crash_grace_s = _crash_grace_s(config)
    try:
        platform.check()
        run = state_dir.new_run()
        log = run / "watchdog.log"
        process = WatchdogProcess(log, crash_grace_s=crash_grace_s, controller=controller_of(config))
    except HarnessError as error:
        config.stash[_FAILURE] = error
    else:
        config.stash[_FORKED] = (process, run)
        config.add_cleanup(lambda: _close(process))


def _close(process: WatchdogProcess) -> None:
    try:
        process.close()
    except WatchdogDied as error:
        # Here an exception would be pytest's internal error; tests that used the watchdog have reported it already.
        sys.stderr.write(f"harness: {error}\n")


def watchdog_of(config: pytest.Config) -> Watchdog:
    """Give this process's watchdog, which is forked now if the plugin has not done it; raises why it cannot run."""
    with _asking:
        return _watchdog_of(config)


def _watchdog_of(config: pytest.Config) -> Watchdog:
    if _FORKED not in config.stash and _FAILURE not in config.stash:
        start(config)
    if _FAILURE in config.stash:
        raise config.stash[_FAILURE]
    if _WATCHDOG not in config.stash:
        process, run = config.stash[_FORKED]
        watchdog = _watchdog(config).attach(process, run)
        try:
            _watch_tests(config, watchdog, run)
        except HarnessError as error:
            config.stash[_FAILURE] = error
            raise
        config.stash[_WATCHDOG] = watchdog
    return config.stash[_WATCHDOG]


def import_all() -> None:
    """Import what this process's watchdog and its tests will need, and that is otherwise imported late."""
    if sys.platform == "linux":  # elsewhere no watchdog can be started, and some of it cannot be imported
        for name in ("client", "hung_tests", "readiness", "remains"):
            importlib.import_module(f"harness.{name}")


def _watchdog(config: pytest.Config) -> Watchdog:
    from harness.client import Watchdog  # noqa: PLC0415 - see the top
    from harness.leasing import DEFAULT_RELEASE_S, DEFAULT_WAIT_S  # noqa: PLC0415 - see the top

    made = Watchdog(
        log_dir=path_of(config, "harness_log_dir"),
        gpu_wait_s=_seconds(config, "harness_gpu_wait_s", None) or DEFAULT_WAIT_S,
        gpu_release_s=_seconds(config, "harness_gpu_release_s", None) or DEFAULT_RELEASE_S,
    )
    made.owner = None  # it is the run's, whichever test asks for it first
    return made


def reports_leaks(config: pytest.Config) -> bool:
    """Say whether the plugin is there, and not only the fixtures: it asks for `unreported_leak` after each test."""
    return _STDERR in config.stash


def unreported_leak(config: pytest.Config) -> HarnessError | None:
    """Give what says that a server's stop left processes or GPU memory behind, once for each server."""
    if _WATCHDOG not in config.stash:
        return None
    from harness.outcomes import StopReport  # noqa: PLC0415 - see the top

    # A server that has not been stopped is looked at again after the next test.
    waiting = config.stash.setdefault(_UNREPORTED, [])
    waiting += config.stash[_WATCHDOG].servers[config.stash.get(_SEEN, 0) :]
    config.stash[_SEEN] = len(config.stash[_WATCHDOG].servers)
    ended = [server.outcome for server in waiting if server.outcome is not None]
    waiting[:] = [server for server in waiting if server.outcome is None]
    try:
        StopReport(tuple(ended), 0.0).raise_if_leaked()
    except HarnessError as error:
        return error
    return None


# ---- deadlines of tests


def keep_stderr(config: pytest.Config) -> None:
    """Keep a way to this process's real standard error: while a test runs, pytest captures what goes there."""
    try:
        descriptor = os.dup(2)
    except OSError:
        descriptor = -1  # it is closed
    config.stash[_STDERR] = descriptor
    if descriptor >= 0:
        config.add_cleanup(lambda: os.close(descriptor))


def _watch_tests(config: pytest.Config, watchdog: Watchdog, run: Path) -> None:
    from harness.hung_tests import DEFAULT_GRACE_S, TestWatch  # noqa: PLC0415 - see the top

    if _STDERR not in config.stash:
        return  # only the fixtures were imported: nobody tells when a test begins
    controller = controller_of(config)
    reports = run if controller is None else state_dir.run_of(controller)
    grace_s = _seconds(config, "harness_deadline_grace_s", None) or DEFAULT_GRACE_S
    watch = TestWatch(watchdog.link, run, reports, grace_s=grace_s, stderr=config.stash[_STDERR])
    config.stash[_TESTS] = watch
    config.add_cleanup(watch.close)
    if _CURRENT in config.stash:
        watch.begin(config.stash[_CURRENT], None)  # in the midst of it


def deadline_s(config: pytest.Config) -> float | None:
    """Give the deadline of tests that have no marker; raises pytest.UsageError for what is no time."""
    return _seconds(config, "harness_deadline", config.getoption("harness_deadline", None))


def _seconds(config: pytest.Config, name: str, given: object) -> float | None:
    text = str(given if given is not None else _ini(config, name) or "")
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    from harness.specs import LONGEST_S  # noqa: PLC0415 - see the top

    if not 0 < seconds <= LONGEST_S:
        raise pytest.UsageError(f"{name} must be a number of seconds above 0 and at most {LONGEST_S:.0f}, not {text!r}")
    return seconds


def check_times(config: pytest.Config) -> None:
    """Raise pytest.UsageError if a setting that is a time is none."""
    deadline_s(config)
    for name in ("harness_deadline_grace_s", "harness_gpu_wait_s", "harness_gpu_release_s"):
        _seconds(config, name, None)


def begin_test(item: pytest.Item) -> None:
    """Tell the watchdog, if it has been asked for or the test has a deadline, that this test begins."""
    config = item.config
    config.stash[_CURRENT] = item.nodeid
    if _TESTS in config.stash:
        config.stash[_TESTS].forget()
    wanted_s = deadline_s(config)
    if wanted_s is not None or item.get_closest_marker("harness_deadline") is not None:
        from harness import hung_tests  # noqa: PLC0415 - see the top

        if _FORKED in config.stash and config.stash[_FORKED][0].owner != os.getpid():
            return  # a forked child, of pytest-forked: its parent's watchdog is not its own
        wanted_s = hung_tests.deadline_of(item, wanted_s)
        watchdog_of(config)
    if _TESTS in config.stash:
        config.stash[_TESTS].begin(item.nodeid, wanted_s)


def end_test(config: pytest.Config) -> None:
    """Tell the watchdog that the test has ended."""
    if config.stash.get(_CURRENT, None) is None:
        return
    del config.stash[_CURRENT]
    if _TESTS in config.stash:
        config.stash[_TESTS].end()


def watched_test(config: pytest.Config) -> TestWatch | None:
    """Give what watches the running test; None where no test has needed that."""
    return config.stash.get(_TESTS, None)


def hung_text(test: str) -> str:
    """Give, in pytest-xdist's controller, why the process of this test was ended by its watchdog; "" if it was not."""
    from harness.hung_tests import report_path  # noqa: PLC0415 - see the top

    try:
        path = report_path(state_dir.run_of(os.getpid()), test)
        text = path.read_text(encoding="utf-8", errors="replace")
        path.unlink()  # it is said once: the worker of a repeated test may end for another reason
    except (OSError, HarnessError):
        return ""
    return text


def controller_of(config: pytest.Config) -> int | None:
    """Give the pid of a pytest-xdist worker's controller; None for another process, or on another host."""
    # A worker whose controller has died runs on for 5 to 15 s (execnet); its servers need not. A worker on another
    # host, or behind another program, has another parent.
    named: int | None = getattr(config, "workerinput", {}).get(CONTROLLER)
    return named if named == os.getppid() else None


def is_controller(config: pytest.Config) -> bool:
    """Say whether this is pytest-xdist's controller, which runs no test itself."""
    return not hasattr(config, "workerinput") and bool(config.getoption("tx", default=None))


def path_of(config: pytest.Config, name: str) -> Path | None:
    """Give the path that an option or a setting of this name gives, from where pytest was started."""
    named = config.getoption(name, None) or _ini(config, name)
    return config.invocation_params.dir / os.path.expanduser(str(named)) if named else None


def flag(config: pytest.Config, name: str) -> bool:
    """Say whether an option or a setting of this name is on."""
    return bool(config.getoption(name, None) or _ini(config, name))


def _crash_grace_s(config: pytest.Config) -> float:
    return _seconds(config, "harness_crash_grace_s", None) or _DEFAULT_CRASH_GRACE_S


def _ini(config: pytest.Config, name: str) -> object:
    try:
        return config.getini(name)
    except ValueError:
        return None  # only the fixtures were imported: the plugin's settings are unknown
