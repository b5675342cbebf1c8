"""What the watchdog and its keepers use while nothing happens."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import harness
from harness import procfs
from tools import bench_figures as figures
from tools.bench_processes import TOOLS, context_switches, private_mib, run_pytest

if TYPE_CHECKING:
    from tools.bench_figures import Figure, Settings

_SETTLE_S = 0.5
_WATCHDOG_LIMIT_MIB = 6.0
_KEEPER_LIMIT_MIB = 1.5


def idle(settings: Settings) -> list[Figure]:
    """Count the context switches of a watchdog and a keeper with one idle server; measure their private memory.

    The peer is a process that sleeps: no switch at all. A process that wakes up now and then disturbs what is measured
    on the machine. The watchdog's memory is that of one in a pytest run of 200 tests which collect garbage: a plain
    fork of pytest would be left with its own copy of every page that pytest changes.
    """
    seconds = settings.choose(10, 4)
    with (
        harness.Watchdog(state_dir=settings.scratch / "state") as watchdog,
        watchdog.launch(["sleep", "1000"]) as server,
    ):
        root = procfs.stat(server.pid)
        pids = {"watchdog": watchdog.pid or 0, "keeper": root.parent if root else 0}
        time.sleep(_SETTLE_S)
        before = {name: context_switches(pid) for name, pid in pids.items()}
        time.sleep(seconds)
        switches = [(name, context_switches(pid) - before[name]) for name, pid in pids.items()]
        keeper_mib = private_mib(Path(f"/proc/{pids['keeper']}/smaps_rollup"))
    return [
        *(figures.plain(f"idle {name} in {seconds} s", "switches", [count], 0.0) for name, count in switches),
        figures.plain("memory watchdog", "MiB", [_watchdog_mib(settings)], _WATCHDOG_LIMIT_MIB),
        figures.plain("memory keeper", "MiB", [keeper_mib], _KEEPER_LIMIT_MIB),
    ]


def _watchdog_mib(settings: Settings) -> float:
    memory = settings.scratch / "memory"
    run_pytest(settings.scratch, str(TOOLS / "bench_case_tests.py"), BENCH_MEMORY=str(memory))
    return private_mib(memory)
