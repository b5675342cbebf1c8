"""A test that starts server trees, tells which processes they are, and waits to be killed. Run by bench_crash.py."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import harness


def test_waits_to_be_killed(watchdog: harness.Watchdog, server_group: harness.ServerGroup) -> None:
    command, processes = json.loads(os.environ["BENCH_TREE"])
    servers = [server_group.launch(command) for _ in range(int(os.environ["BENCH_SERVERS"]))]
    while any(len(server.pids()) < processes for server in servers):
        time.sleep(0.005)
    pids = [pid for server in servers for pid in server.pids()]
    os.write(int(os.environ["BENCH_PIPE"]), json.dumps([watchdog.pid, pids]).encode() + b"\n")
    signal.pause()
