"""A server's own deadline, without pytest: the watchdog keeps it, whatever the test process does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from faults.runs import Watched

import harness

if TYPE_CHECKING:
    from pathlib import Path


def test_who_waits_for_a_server_that_reaches_its_deadline_is_told(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(["sleep", "600"], name="a", deadline_s=0.3)
    outcome = server.wait(timeout_s=30)
    assert (outcome.how, outcome.returncode) == ("asked", -signal.SIGTERM)
    assert outcome.reason == "its deadline of 0.3 s has passed"
    assert str(outcome).endswith("since its deadline of 0.3 s has passed")


def test_who_waits_until_it_is_ready_is_told_as_well(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(["sleep", "600"], name="a", ready=harness.port_open(), deadline_s=0.3)
    with pytest.raises(harness.ServerExited, match=r"stopped by the watchdog: its deadline of 0\.3 s has passed"):
        server.wait_ready(timeout_s=30)


def test_a_server_that_is_stopped_before_its_deadline_has_no_reason(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(["sleep", "600"], name="a", deadline_s=60)
    assert server.stop().reason == ""


def test_the_deadline_is_kept_while_the_test_process_is_stopped(tmp_path: Path) -> None:
    script = f"""
import os, signal, time
import harness
watchdog = harness.Watchdog(state_dir={str(tmp_path / "state")!r}).start()
other = watchdog.launch(["sleep", "600"])
server = watchdog.launch(["sh", "-c", "trap '' TERM; sleep 600 & wait; wait"], deadline_s=4.0, grace_s=0.2)
while server.is_alive and len(server.pids()) < 2:
    time.sleep(0.01)  # nothing tells of a shell's child
print(*[other.pid, *server.pids()], flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as client:
        try:
            assert client.stdout is not None
            other, *pids = [int(pid) for pid in client.stdout.readline().split()]
            os.kill(client.pid, signal.SIGSTOP)
            with Watched(pids) as watched, Watched([other]) as without:
                assert watched.wait_gone(30.0) == []
                assert without.alive() == [other]
                client.kill()
                assert without.wait_gone(30.0) == []
        finally:
            client.kill()
