"""A stop goes on while the test process cannot: 64 servers that ignore SIGTERM, and a test process that is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import processes
from servers.commands import READY_S, STUBBORN

if TYPE_CHECKING:
    from pathlib import Path

SERVERS = 64
GRACE_S = 0.5
# Killing and reaping 128 processes on a busy machine of two cores; with the pipe of an earlier keeper in each later one
# it took 37 s.
MARGIN_S = 8.0

SCRIPT = """
import sys, threading
import harness

servers, grace_s, stubborn = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
with harness.Watchdog() as watchdog, watchdog.group() as group:
    for _ in range(servers):
        group.launch(stubborn, ready=harness.log_line("ready"))
    group.wait_ready(60)
    print(*(pid for server in group.servers for pid in server.pids()), flush=True)
    stop = threading.Thread(target=group.stop, kwargs={"grace_s": grace_s})
    stop.start()
    while group.servers[-1].state == "running":
        pass
    print("asked", flush=True)
    stop.join()
    print(*{server.stop().how for server in group.servers}, flush=True)
"""


def test_a_stop_goes_on_while_the_test_process_is_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(SERVERS), str(GRACE_S), *STUBBORN]
    environment = {**os.environ, "HARNESS_STATE_DIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as client:
        try:
            assert client.stdout is not None
            people = processes.identities(map(int, client.stdout.readline().split()))
            assert len(people) == 2 * SERVERS
            assert client.stdout.readline() == "asked\n"
            client.send_signal(signal.SIGSTOP)
            began = time.monotonic()
            processes.wait_gone(people, GRACE_S + MARGIN_S)
            assert time.monotonic() - began < GRACE_S + MARGIN_S
            client.send_signal(signal.SIGCONT)
            assert client.stdout.read() == "killed\n"
            assert client.wait(READY_S) == 0
        finally:
            client.kill()
