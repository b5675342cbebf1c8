"""A watchdog for one test alone, and the proof after every test that nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import textwrap
import uuid
from typing import TYPE_CHECKING

import processes
import psutil
import pytest

import harness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_MARKER = "HARNESS_EDGES_TEST"


@pytest.fixture(autouse=True)
def nothing_survives(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Find every process that inherited this test's environment, every child and every descriptor that it left."""
    marker = f"{_MARKER}={uuid.uuid4().hex}"
    monkeypatch.setenv(*marker.split("="))
    children = set(processes.tree(os.getpid()))
    descriptors = processes.descriptors()
    yield
    left = processes.marked(marker)
    # A keeper may still be on its way out when it has told that its server is gone, and a broker when its watchdog has
    # ended; servers may not.
    keepers = [pid for pid in left if processes.name(pid) in {"harness-keeper", "harness-broker"}]
    processes.wait_gone(keepers, 2.0)
    assert not (set(left) - set(keepers)), processes.describe(set(left) - set(keepers))
    fresh = set(processes.tree(os.getpid())) - children
    assert not fresh, processes.describe(fresh)
    opened = {number: what for number, what in processes.descriptors().items() if number not in descriptors}
    assert not opened


@pytest.fixture
def watchdog(tmp_path: Path) -> Iterator[harness.Watchdog]:
    """Give a watchdog of this test's own; when it is closed, its whole tree must be gone and its ports free."""
    with harness.Watchdog(state_dir=tmp_path / "state") as owner:
        yield owner
        everything = processes.identities(processes.tree(owner.pid or 0))
    keepers = [who for who in everything if processes.name(who.pid) in {"harness-keeper", "harness-broker"}]
    processes.wait_gone(keepers, 2.0)
    assert not [who for who in everything if processes.is_running(who)]
    assert not owner.is_alive
    for server in owner.servers:
        with contextlib.suppress(harness.HarnessError):  # adopted ones have no port
            for port in (server.port, *server.ports.values()):
                assert_listens_nobody(port)


def assert_listens_nobody(port: int) -> None:
    """Listen on a port as any program would: a connection that waits in TIME_WAIT does not count.

    By now the number may be another test's, which runs beside this one.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))  # noqa: S104 - every address must be free
            probe.listen()
        except OSError:
            if "PYTEST_XDIST_WORKER" not in os.environ:
                raise
            ours = [pid for pid in _listeners(port) if not _is_of_another_worker(pid)]
            assert not ours, processes.describe(ours)


def _listeners(port: int) -> list[int]:
    listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    return [one.pid for one in listening if one.laddr and one.laddr.port == port and one.pid is not None]


def _is_of_another_worker(pid: int) -> bool:
    """Say whether a process descends from the parent that all workers have, and not from this one."""
    try:
        while pid not in {0, os.getpid(), os.getppid()}:
            pid = processes.parent(pid)
    except IndexError:
        return True  # it has ended meanwhile: nobody listens
    return pid == os.getppid()


@pytest.fixture
def run_script(tmp_path: Path) -> Callable[..., str]:
    """Give a function that runs code as a test process of its own; its warnings are errors, and it must end with 0.

    `via` is what a shell does with the command, which is in "$@".
    """

    def run(*codes: str, via: str = 'exec "$@"') -> str:
        code = "\n".join(map(textwrap.dedent, codes))
        command = ["/bin/sh", "-c", via, "sh", sys.executable, "-W", "error", "-c", code]
        environment = {**os.environ, "HARNESS_STATE_DIR": str(tmp_path / "state"), "RESULT": str(tmp_path / "result")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    return run
