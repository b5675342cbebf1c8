"""What a library costs people who use no server: a run of one trivial test."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from importlib import util
from typing import TYPE_CHECKING

from tools.benchmarks.processes import HERE, MILLISECONDS, environment, run_pytest
from tools.benchmarks.rows import LIMIT, OURS, Row

if TYPE_CHECKING:
    from tools.benchmarks.rows import Settings

_TEST = f"{HERE / 'case_trivial.py'}::test_trivial"
_RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    OURS: ("harness", ()),
    LIMIT: ("none", ()),
    "pytest-xprocess": ("xprocess", ()),
    "mirakuru": ("none", ("-p", "mirakuru")),
    "psutil": ("none", ("-p", "psutil")),
}

_PART_RUNS = 7
_IMPORT = "began = time.perf_counter(); import harness.plugin; print(time.perf_counter() - began)"
_FORK = """
from harness import state_dir
from harness.forking import WatchdogProcess

began = time.perf_counter()
run = state_dir.new_run()
WatchdogProcess(run / "watchdog.log", crash_grace_s=5.0).close()
print(time.perf_counter() - began)
"""
_WATCHDOG = """
from harness import state_dir
from harness.forking import WatchdogProcess

process = WatchdogProcess(state_dir.new_run() / "watchdog.log", crash_grace_s=5.0)
time.sleep(0.5)  # its start takes less
print(int(open(f"/proc/{process.pid}/schedstat").read().split()[0]) / 1e9)
process.close()
"""


def plugin(settings: Settings) -> list[Row]:
    """Run pytest on one trivial test, with each library loaded, and with none.

    For this project that is its import, the fork of the watchdog, and its end; for mirakuru and psutil the import.
    """
    chosen = [OURS, LIMIT] if settings.is_quick else [way for way in _RUNS if way != "mirakuru" or util.find_spec(way)]
    samples: dict[str, list[float]] = {way: [] for way in chosen}
    for way in chosen:
        _took_ms(settings, way)  # warms the file cache
    for number in range(settings.choose(20, 5)):
        turn = number % len(chosen)
        for way in (*chosen[turn:], *chosen[:turn]):
            samples[way].append(_took_ms(settings, way))
    name, limit = "a run of one test without servers", "pytest without any of them"
    return [Row(name, "ms", samples, limit, 2.0, *(() if settings.is_quick else _costs(settings)))]


def _costs(settings: Settings) -> tuple[str, float]:
    """Measure the parts, each by itself; give them in words, and what they are together if nothing runs beside."""
    parts = [_part(settings, code) for code in (_IMPORT, _FORK, _WATCHDOG)]
    text = (
        f"the import takes {parts[0]:.0f} ms, the watchdog's fork and end {parts[1]:.0f} ms; the watchdog's own"
        f" start, a Python and its modules, takes {parts[2]:.0f} ms of CPU beside pytest's, on"
        f" {len(os.sched_getaffinity(0))} cores."
    )
    return text, sum(parts)


def _part(settings: Settings, code: str) -> float:
    """Give the median of what a program prints, in ms."""
    command = [sys.executable, "-c", f"import time, pytest, json\n{code}"]
    where = environment(settings.scratch)
    runs = [subprocess.run(command, env=where, capture_output=True, check=True).stdout for _ in range(_PART_RUNS)]
    return statistics.median(float(said) for said in runs) * MILLISECONDS


def _took_ms(settings: Settings, way: str) -> float:
    name, options = _RUNS[way]
    return run_pytest(settings.scratch, *options, _TEST, plugin=name) * MILLISECONDS
