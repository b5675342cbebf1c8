"""Launching servers, and waiting until they are ready."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import harness
from tools.benchmarks import ways
from tools.benchmarks.processes import HERE, MILLISECONDS, ROOT, run_pytest
from tools.benchmarks.rows import LIMIT, OURS, Row
from tools.benchmarks.runs import PLUGINS

if TYPE_CHECKING:
    from tools.benchmarks.rows import Settings

_PROGRAM = ["true"]
_DELAYS_S = (0.0, 0.5)
_LONG_DELAYS_S = (3.0, 5.0)
# Prints how many ms it takes from the first fork to the execve, which closes the pipe.
_TWO_FORKS = """
import os, time
import harness.watchdog.main

def once():
    reader, writer = os.pipe()
    began = time.monotonic()
    keeper = os.fork()
    if not keeper:
        root = os.fork()
        if not root:
            os.execvp("true", ["true"])
        os.close(writer)
        os.waitpid(root, 0)
        os._exit(0)
    os.close(writer)
    os.read(reader, 1)
    took_s = time.monotonic() - began
    os.waitpid(keeper, 0)
    os.close(reader)
    return took_s

print(sorted(once() for _ in range(31))[15] * 1000)
"""
_ROUNDS = 7


def launch(settings: Settings) -> list[Row]:
    """Launch a program that exits at once, against the Popen that suites use otherwise.

    Both return once the program is executed. A launch forks twice (a keeper and the root), holds a port and crosses the
    Pipe.
    """
    samples: dict[str, list[float]] = {OURS: [], LIMIT: []}
    with harness.Watchdog(state_dir=settings.scratch / "state") as watchdog:
        for _ in range(settings.choose(100, 60)):
            samples[LIMIT].append(_one_popen())
            samples[OURS].append(_one_launch(watchdog))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{_TWO_FORKS}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, check=True)
    reason = (
        "a launch forks a keeper, which forks the root: two forks and an execve of a Python with the watchdog's modules"
        f" take {float(done.stdout):.1f} ms alone."
    )
    return [Row("launch", "ms", samples, "subprocess.Popen of the same program", 100.0, reason, float(done.stdout))]


def _one_launch(watchdog: harness.Watchdog) -> float:
    began = time.monotonic()
    server = watchdog.launch(_PROGRAM)
    took_s = time.monotonic() - began
    server.wait()
    return took_s * MILLISECONDS


def _one_popen() -> float:
    began = time.monotonic()
    process = subprocess.Popen(_PROGRAM)
    took_s = time.monotonic() - began
    process.wait()
    return took_s * MILLISECONDS


def ready(settings: Settings) -> list[Row]:
    """Wait for servers that begin to listen after a random time: how late the wait returns.

    Long delays are measured apart, since a wait that polls more and more slowly is late only for them.
    """
    return [
        _lateness("ready: known after the port opened", settings, _DELAYS_S, 3),
        _lateness("ready after seconds: known after the port opened", settings, _LONG_DELAYS_S, 1),
    ]


def _lateness(name: str, settings: Settings, delays_s: tuple[float, float], each: int) -> Row:
    choice = random.Random()  # noqa: S311 - nothing is secret here
    chosen = (OURS, *(way for way in ways.IN_TURN if way != "Popen + psutil"))
    samples: dict[str, list[float]] = {way: [] for way in chosen}
    for number in range(_ROUNDS):
        delays = [choice.uniform(*delays_s) for _ in range(each)]
        turn = number % len(chosen)
        for way in (*chosen[turn:], *chosen[:turn]):
            samples[way] += _late_ms(settings, way, delays)
    samples[LIMIT] = [0.0]
    return Row(name, "ms", samples, "the moment at which the server itself began to listen", bound=float("inf"))


def _late_ms(settings: Settings, way: str, delays_s: list[float]) -> list[float]:
    # A directory of its own: pytest-xprocess takes a pid that it finds in its cache for the server's.
    with tempfile.TemporaryDirectory(dir=settings.scratch, ignore_cleanup_errors=True) as folder:
        result = Path(folder, "late.json")
        plan = json.dumps({"way": way, "delays_s": delays_s, "result": str(result)})
        case, plugin = str(HERE / "case_ready.py"), PLUGINS.get(way, "none")
        run_pytest(Path(folder), case, plugin=plugin, BENCH_PLAN=plan, PYTHONWARNINGS="ignore")
        found: list[float] = json.loads(result.read_bytes())
        return found
