"""The pytest plugin: options, and one watchdog for each process that runs tests."""

from __future__ import annotations

import os
from typing import Any

import pytest

from harness import session
from harness.fixtures import server_group, watchdog

__all__ = ["server_group", "watchdog"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, each with an ini name in underscores."""
    group = parser.getgroup("harness", "servers owned by a watchdog")
    group.addoption(
        "--harness-log-dir",
        metavar="DIR",
        help="keep the servers' logs in DIR (ini: harness_log_dir). By default they are in the state directory, and are"
        " removed a day after the run.",
    )
    parser.addini("harness_log_dir", "keep the servers' logs in this directory")
    parser.addini(
        "harness_crash_grace_s",
        "seconds between asking and killing each server when the test process has died (default: 5.0)",
        default="5.0",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Fork the watchdog early, while this process is small; not in a pytest-xdist controller, which runs no test."""
    if not _is_controller(config):
        session.start(config)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a pytest-xdist worker who its controller is: its servers are stopped when either of the two ends."""
    node.workerinput[session.CONTROLLER] = os.getpid()


def _is_controller(config: pytest.Config) -> bool:
    return not hasattr(config, "workerinput") and bool(config.getoption("tx", default=None))
