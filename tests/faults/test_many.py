"""Sixty servers of six processes that ignore SIGTERM, in one watchdog. `tools/bench scale` has five hundred."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from faults.runs import Watched

if TYPE_CHECKING:
    from pathlib import Path

SERVERS = 60
# A root, four workers and a daemon.
TREE = "trap '' TERM; (setsid sleep 1000 &); for _ in 1 2 3 4; do sleep 1000 & done; echo ready; wait"
PROCESSES = 6
GRACE_S = 1.0
SCRIPT = f"""
import sys, time
import harness
from harness import procfs
watchdog = harness.Watchdog(state_dir=sys.argv[1], crash_grace_s={GRACE_S}).start()
group = watchdog.group()
for _ in range({SERVERS}):
    group.launch(["sh", "-c", {TREE!r}], ready=harness.log_line("ready"), grace_s={GRACE_S})
group.wait_ready(timeout_s=60)
while len(procfs.descendants(watchdog.pid)) < {SERVERS * (PROCESSES + 1)}:
    time.sleep(0.01)  # a daemon's root may be ready before it
print(watchdog.pid, *procfs.descendants(watchdog.pid), flush=True)
if sys.stdin.readline() == "stop\\n":
    report = group.stop()
    print(report.is_clean, *{{outcome.how for outcome in report.outcomes}}, len(report.outcomes), flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["stop", "kill the test process", "kill the watchdog"])
@pytest.mark.usefixtures("bystander")
def test_nothing_of_many_servers_is_left(tmp_path: Path, end: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "state")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        watchdog, *pids = map(int, client.stdout.readline().split())
        assert len(pids) == SERVERS * (PROCESSES + 1)
        with Watched(pids) as watched, Watched([watchdog]) as owner:
            if end == "stop":
                client.stdin.write("stop\n")
                client.stdin.flush()
                assert client.stdout.readline() == f"True killed {SERVERS}\n"
            elif end == "kill the watchdog":
                os.kill(watchdog, signal.SIGKILL)
            else:
                client.kill()
            assert watched.wait_gone(20.0) == []
            client.kill()
            assert owner.wait_gone(20.0) == []
