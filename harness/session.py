"""The one watchdog of a pytest process: started early, kept in pytest's config, closed at its end."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from harness import specs
from harness.client import DEFAULT_CRASH_GRACE_S, Watchdog
from harness.errors import HarnessError, WatchdogDied

if TYPE_CHECKING:
    from pathlib import Path

_WATCHDOG = pytest.StashKey[Watchdog]()
# The key under which the controller tells its workers its pid.
CONTROLLER = "harness_controller"
_FAILURE = pytest.StashKey[HarnessError]()


def start(config: pytest.Config) -> None:
    """Fork the watchdog; what prevents it is raised only where a test needs a watchdog."""
    try:
        log_dir, crash_grace_s = _options(config)
        owner = Watchdog(log_dir=log_dir, crash_grace_s=crash_grace_s, controller=_controller(config)).start()
    except HarnessError as error:
        config.stash[_FAILURE] = error
    else:
        config.stash[_WATCHDOG] = owner
        config.add_cleanup(lambda: _close(owner))


def _close(owner: Watchdog) -> None:
    try:
        owner.close()
    except WatchdogDied as error:
        # Here an exception would be pytest's internal error; tests that used the watchdog have reported it already.
        sys.stderr.write(f"harness: {error}\n")


def watchdog_of(config: pytest.Config) -> Watchdog:
    """Give this process's watchdog, which is started now if the plugin has not done it; raises why it cannot run."""
    if _WATCHDOG not in config.stash and _FAILURE not in config.stash:
        start(config)
    if _FAILURE in config.stash:
        raise config.stash[_FAILURE]
    return config.stash[_WATCHDOG]


def _controller(config: pytest.Config) -> int | None:
    # A worker whose controller has died runs on for 5 to 15 s (execnet); its servers need not. A worker on another
    # host, or behind another program, has another parent.
    named: int | None = getattr(config, "workerinput", {}).get(CONTROLLER)
    return named if named == os.getppid() else None


def _options(config: pytest.Config) -> tuple[Path | None, float]:
    try:
        log_dir = config.getoption("harness_log_dir") or config.getini("harness_log_dir")
        grace = config.getini("harness_crash_grace_s")
    except ValueError:
        return None, DEFAULT_CRASH_GRACE_S  # only the fixtures were imported: the plugin's options are unknown
    return (config.invocation_params.dir / str(log_dir) if log_dir else None), _seconds(str(grace))


def _seconds(text: str) -> float:
    try:
        return specs.seconds(float(text), "it")
    except ValueError:
        raise pytest.UsageError(f"harness_crash_grace_s must be a number above 0, not {text!r}") from None
