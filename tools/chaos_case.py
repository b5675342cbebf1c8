"""The suite of a trial: launches the servers that its plan names, and waits until the runner lets it end them."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import harness
from tools import chaos_say

if TYPE_CHECKING:
    from collections.abc import Callable

_SERVER = str(Path(__file__).with_name("chaos_server.py"))
_SETTINGS = chaos_say.settings()
_READY_S = 4.0


@pytest.mark.parametrize("servers", _SETTINGS["tests"])
def test_servers(server_group: harness.ServerGroup, servers: list[dict[str, Any]]) -> None:
    # What a fault does to this test is its own affair; it must come to where the servers are up all the same.
    with contextlib.suppress(harness.HarnessError):
        for server in servers:
            _launch(server_group, server)
        server_group.wait_ready(timeout_s=_READY_S)
    chaos_say.hold()


def _launch(group: harness.ServerGroup, server: dict[str, Any]) -> None:
    port = "{port}" if server["ready"] == "port" else "0"
    command = [sys.executable, "-I", "-S", _SERVER, _SETTINGS["mark"], json.dumps(server["tree"]), port]
    group.launch(command, ready=_ready(server["ready"]), grace_s=server["grace_s"], ask=server["ask"])


def _ready(name: str) -> Callable[[harness.Server], bool] | None:
    if name == "log":
        return harness.log_line("ready")
    if name == "port":
        return harness.port_open()
    return _ask_runner if name == "call" else None


def _ask_runner(_server: harness.Server) -> bool:
    chaos_say.reach("waiting for readiness")
    return True
