"""The one watchdog of a pytest process: forked early, kept in pytest's config, closed at its end.

Most runs, and all xdist controllers, use no server. So only what the fork needs is imported early; the rest of the
client is imported when the first test asks for a watchdog.
"""

from __future__ import annotations

import math
import os
import sys
from typing import TYPE_CHECKING

import pytest

from harness import platform, state_dir
from harness.errors import HarnessError, WatchdogDied
from harness.forking import WatchdogProcess

if TYPE_CHECKING:
    from pathlib import Path

    from harness.client import Watchdog

_DEFAULT_CRASH_GRACE_S = 5.0
_WATCHDOG = pytest.StashKey["Watchdog"]()
_FORKED = pytest.StashKey[tuple[WatchdogProcess, "Path"]]()
_FAILURE = pytest.StashKey[HarnessError]()
# The key under which the controller tells its workers its pid.
CONTROLLER = "harness_controller"


def start(config: pytest.Config) -> None:
    """Fork the watchdog; what prevents it is raised only where a test needs a watchdog."""
    crash_grace_s = _crash_grace_s(config)
    try:
        platform.check()
        run = state_dir.new_run()
        log = run / "watchdog.log"
        process = WatchdogProcess(log, crash_grace_s=crash_grace_s, controller=_controller(config))
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
    from harness.client import Watchdog  # noqa: PLC0415 - see the top: most runs do without

    if _FORKED not in config.stash and _FAILURE not in config.stash:
        start(config)
    if _FAILURE in config.stash:
        raise config.stash[_FAILURE]
    if _WATCHDOG not in config.stash:
        process, run = config.stash[_FORKED]
        config.stash[_WATCHDOG] = Watchdog(log_dir=_log_dir(config)).attach(process, run)
    return config.stash[_WATCHDOG]


def _controller(config: pytest.Config) -> int | None:
    # A worker whose controller has died runs on for 5 to 15 s (execnet); its servers need not. A worker on another
    # host, or behind another program, has another parent.
    named: int | None = getattr(config, "workerinput", {}).get(CONTROLLER)
    return named if named == os.getppid() else None


def _log_dir(config: pytest.Config) -> Path | None:
    named = config.getoption("harness_log_dir", None) or _ini(config, "harness_log_dir")
    return config.invocation_params.dir / str(named) if named else None


def _crash_grace_s(config: pytest.Config) -> float:
    text = str(_ini(config, "harness_crash_grace_s") or _DEFAULT_CRASH_GRACE_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise pytest.UsageError(f"harness_crash_grace_s must be a number of seconds above 0, not {text!r}")
    return seconds


def _ini(config: pytest.Config, name: str) -> object:
    try:
        return config.getini(name)
    except ValueError:
        return None  # only the fixtures were imported: the plugin's settings are unknown
