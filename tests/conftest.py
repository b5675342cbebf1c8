"""What all tests share."""

from __future__ import annotations

import os
import signal

import pytest

# Wherever they are installed pytest-randomly shuffles, pytest-rerunfailures starts a thread, and pytest-asyncio warns
# of a setting that is not made: the runs that tests start are without, unless a test wants them.
PLAIN = "-p no:randomly -p no:rerunfailures -p no:asyncio"
os.environ["PYTEST_ADDOPTS"] = PLAIN

# Where this run was started in the background of a shell, or by nohup, some are ignored, and so they would be in each
# pytest run that a test starts and then interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

pytest_plugins = ["pytester"]


@pytest.fixture
def pytester(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Give pytest's own fixture, whose runs are plain: it takes the variable away."""
    monkeypatch.setenv("PYTEST_ADDOPTS", PLAIN)
    return pytester
