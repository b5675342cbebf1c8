"""Tests that launch real servers and leave nothing behind: see README.md.

The public names are loaded at their first use: the watchdog process imports this package too, and must stay small.
"""

from __future__ import annotations

import importlib

# typing itself would be 0.6 MiB in the watchdog and each keeper.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from harness.client import Watchdog
    from harness.errors import (
        GpuNotReleased,
        GpuUnavailable,
        HarnessError,
        LaunchFailed,
        Leaked,
        NotReady,
        PlatformNotSupported,
        ServerExited,
        SpecError,
        WatchdogDied,
    )
    from harness.group import ServerGroup
    from harness.outcomes import DeviceRelease, GpuProcess, GpuRelease, ServerOutcome, StopReport, Survivor
    from harness.popen import ServerProcess
    from harness.readiness import http_ok, log_line, port_open
    from harness.server import Server

__all__ = [
    "DeviceRelease",
    "GpuNotReleased",
    "GpuProcess",
    "GpuRelease",
    "GpuUnavailable",
    "HarnessError",
    "LaunchFailed",
    "Leaked",
    "NotReady",
    "PlatformNotSupported",
    "Server",
    "ServerExited",
    "ServerGroup",
    "ServerOutcome",
    "ServerProcess",
    "SpecError",
    "StopReport",
    "Survivor",
    "Watchdog",
    "WatchdogDied",
    "http_ok",
    "log_line",
    "port_open",
]

_HOMES = {
    "Server": "server",
    "ServerGroup": "group",
    "ServerProcess": "popen",
    "Watchdog": "client",
    "http_ok": "readiness",
    "log_line": "readiness",
    "port_open": "readiness",
    **dict.fromkeys(
        ("DeviceRelease", "GpuProcess", "GpuRelease", "ServerOutcome", "StopReport", "Survivor"), "outcomes"
    ),
}


def __getattr__(name: str) -> object:
    """Load a public name from its module."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"harness.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
