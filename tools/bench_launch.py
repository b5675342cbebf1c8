"""Starting servers: how long a launch takes, and how soon it is known that a server is ready."""

from __future__ import annotations

import random
import subprocess
import time
from typing import TYPE_CHECKING

import harness
from tools import bench_figures as figures
from tools.bench_processes import MILLISECONDS, python_program

if TYPE_CHECKING:
    from pathlib import Path

    from tools.bench_figures import Figure, Settings

_PROGRAM = ["true"]
_LAUNCH_LIMIT_MS = 6.0
_READY_LIMIT_MS = 10.0
_DELAYS_S = (0.1, 0.5)
_LONG_DELAYS_S = (3.0, 3.5)


def launch(settings: Settings) -> list[Figure]:
    """Launch a program, against `subprocess.Popen` of the same one.

    Popen is what a test would use otherwise; both return once the program is executed. A launch forks twice (a keeper
    and the root), holds a port and crosses the Pipe.
    """
    launches_ms, popens_ms = [], []
    with harness.Watchdog(state_dir=settings.scratch / "state") as watchdog:
        for _ in range(settings.choose(100, 60)):
            popens_ms.append(_one_popen() * MILLISECONDS)
            launches_ms.append(_one_launch(watchdog) * MILLISECONDS)
    return [figures.difference("launch", "ms", launches_ms, popens_ms, _LAUNCH_LIMIT_MS)]


def _one_launch(watchdog: harness.Watchdog) -> float:
    began = time.monotonic()
    server = watchdog.launch(_PROGRAM)
    seconds = time.monotonic() - began
    server.wait()
    return seconds


def _one_popen() -> float:
    began = time.monotonic()
    process = subprocess.Popen(_PROGRAM)
    seconds = time.monotonic() - began
    process.wait()
    return seconds


def ready(settings: Settings) -> list[Figure]:
    """Wait for servers that begin to listen after a random time: how late `wait_ready` returns.

    The peer is the server itself, which writes down when it began to listen. Long delays are measured apart, since a
    wait that polls more and more slowly is late only for them.
    """
    late_ms = _lateness_ms(settings, settings.choose(30, 10), _DELAYS_S)
    long_late_ms = _lateness_ms(settings, settings.choose(5, 2), _LONG_DELAYS_S)
    return [
        figures.plain("ready", "ms", late_ms, _READY_LIMIT_MS),
        figures.plain("ready after seconds", "ms", long_late_ms, _READY_LIMIT_MS),
    ]


def _lateness_ms(settings: Settings, count: int, delays_s: tuple[float, float]) -> list[float]:
    choice = random.Random()  # noqa: S311 - nothing is secret here
    with harness.Watchdog(state_dir=settings.scratch / "state") as watchdog:
        return [
            _one_lateness(watchdog, settings.scratch / "ready.time", choice.uniform(*delays_s)) * MILLISECONDS
            for _ in range(count)
        ]


def _one_lateness(watchdog: harness.Watchdog, path: Path, delay_s: float) -> float:
    command = python_program("bench_server_http.py", "{port}", str(delay_s), str(path))
    with watchdog.launch(command, ready=harness.http_ok(), ready_timeout_s=30.0) as server:
        server.wait_ready()
        known = time.monotonic()
    return known - float(path.read_text(encoding="ascii"))
