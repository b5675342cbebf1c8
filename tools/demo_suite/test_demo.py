"""A suite as a user would write it: every test launches real HTTP servers, and none of them cleans up."""

from __future__ import annotations

import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import harness

if TYPE_CHECKING:
    from harness import Server, ServerGroup

HERE = Path(__file__).parent
UVICORN = [sys.executable, "-m", "uvicorn", "app:app", "--port", "{port}"]


def get(server: Server) -> str:
    with urllib.request.urlopen(server.url("/"), timeout=10) as answer:  # noqa: S310 - the URL is http
        return str(answer.read().decode())


def use(group: ServerGroup, seconds: float = 1.0) -> None:
    """Talk to the servers for a while, as a real test would."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for server in group.servers:
            assert "from worker" in get(server)


@pytest.mark.parametrize("workers", [2, 3])
def test_a_data_parallel_pair(server_group: ServerGroup, workers: int) -> None:
    for rank in range(2):
        command = [*UVICORN, "--workers", str(workers)]
        server_group.launch(command, name=f"rank{rank}", env={"RANK": str(rank)}, cwd=HERE, ready=harness.http_ok("/"))
    server_group.wait_ready(timeout_s=60)
    assert "rank 1" in get(server_group.servers[1])
    use(server_group)


def test_a_server_that_ignores_sigterm(server_group: ServerGroup) -> None:
    command = [sys.executable, "stubborn.py", "{port}"]
    server_group.launch(command, name="stubborn", cwd=HERE, ready=harness.http_ok("/"), grace_s=1.0)
    server_group.wait_ready(timeout_s=60)
    use(server_group)


def test_a_server_that_daemonises_a_child(server_group: ServerGroup) -> None:
    script = f"(setsid sleep 1000 &); exec {' '.join(UVICORN)}"
    server_group.launch(["sh", "-c", script], name="with-daemon", cwd=HERE, ready=harness.http_ok("/"))
    server_group.wait_ready(timeout_s=60)
    assert len(server_group.servers[0].pids()) == 2
    use(server_group)
