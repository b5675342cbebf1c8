"""Hundreds of servers in one watchdog: whether a server costs the same among many as among few."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import harness
from harness import procfs
from tools import bench_figures as figures
from tools.bench_processes import MILLISECONDS, context_switches, private_mib

if TYPE_CHECKING:
    from tools.bench_figures import Figure, Settings

# A root, four workers and a daemon; all of them ignore SIGTERM.
_TREE = "trap '' TERM; (setsid sleep 1000 &); for _ in 1 2 3 4; do sleep 1000 & done; echo ready; wait"
_TREE_PROCESSES = 6
_GRACE_S = 1.0
_READY_S = 120.0
_SETTLE_S = 1.0
_POLL_S = 0.1
_STOP_LIMIT_S = 1.0
_LINEAR_LIMIT = 1.5
_WATCHDOG_LIMIT_MIB = 16.0
_KEEPER_LIMIT_MIB = 2.0
_HEADINGS = (
    *("servers", "processes", "launch, ms each", "ready, s", "stop after grace, s", "ms each"),
    *("watchdog MiB", "keeper MiB", "idle s", "switches", "CPU ms", "survivors"),
)


class _Scale(NamedTuple):
    """What some number of servers cost; the columns of the table."""

    servers: int
    processes: int
    launch_ms: float
    ready_s: float
    stop_s: float
    stop_ms: float
    watchdog_mib: float
    keeper_mib: float
    idle_s: int
    switches: int
    cpu_ms: float
    survivors: int


def scale(settings: Settings) -> list[Figure]:
    """Launch 50 to 500 servers of 6 processes that ignore SIGTERM, leave them idle, and stop them as one group.

    The peer is the same with few servers: what a server costs must not grow with their number.
    """
    idle_s = settings.choose(10, 2)
    counts = (50, 100) if settings.is_quick else (50, 100, 200, 500)
    rows = [_measure(settings.scratch, servers, idle_s) for servers in counts]
    few, many = rows[0], rows[-1]
    name = f"scale-{many.servers}"
    peer = f"against {few.servers}"
    lines = figures.columns([_HEADINGS, *(tuple(map(figures.number, row)) for row in rows)])
    return [
        figures.plain(f"{name} stop after grace", "s", [many.stop_s], _STOP_LIMIT_S, note="\n".join(["", *lines])),
        figures.plain(f"{name} survivors", "processes", [row.survivors for row in rows], 0.0),
        figures.ratio(f"{name} launch {peer}", "ms", [many.launch_ms], [few.launch_ms], _LINEAR_LIMIT),
        figures.ratio(f"{name} stop {peer}", "ms", [many.stop_ms], [few.stop_ms], _LINEAR_LIMIT),
        figures.plain(f"{name} memory watchdog", "MiB", [many.watchdog_mib], _WATCHDOG_LIMIT_MIB),
        figures.plain(f"{name} memory keeper", "MiB", [many.keeper_mib], _KEEPER_LIMIT_MIB),
        figures.plain(f"{name} idle in {idle_s} s", "switches", [many.switches], 0.0),
    ]


def _measure(scratch: Path, servers: int, idle_s: int) -> _Scale:
    with harness.Watchdog(state_dir=scratch / "state") as watchdog, watchdog.group("scale") as group:
        began = time.monotonic()
        for _ in range(servers):
            group.launch(["sh", "-c", _TREE], ready=harness.log_line("ready"), grace_s=_GRACE_S)
        launched = time.monotonic()
        group.wait_ready(timeout_s=_READY_S)
        ready = time.monotonic()
        keepers, everybody = _processes(watchdog.pid or 0, servers)
        switches, cpu_ms = _idle([watchdog.pid or 0, *keepers], idle_s)
        watchdog_mib = _private_mib(watchdog.pid or 0)
        keeper_mib = statistics.mean(map(_private_mib, keepers))
        called = time.monotonic()
        report = group.stop()
        stop_s = time.monotonic() - called - _GRACE_S
        survivors = [pid for pid, start_time in everybody if procfs.is_alive(pid, start_time)]
    if any(outcome.how != "killed" for outcome in report.outcomes):
        raise RuntimeError(f"the servers were not stopped as they should be: {report}")
    return _Scale(
        servers=servers,
        processes=servers * _TREE_PROCESSES,
        launch_ms=(launched - began) / servers * MILLISECONDS,
        ready_s=ready - launched,
        stop_s=stop_s,
        stop_ms=stop_s / servers * MILLISECONDS,
        watchdog_mib=watchdog_mib,
        keeper_mib=keeper_mib,
        idle_s=idle_s,
        switches=switches,
        cpu_ms=cpu_ms,
        survivors=len(survivors),
    )


def _processes(watchdog: int, servers: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Wait until all processes are there; give the keepers, and every server's process with its start time."""
    limit = time.monotonic() + _READY_S
    while len(pids := procfs.descendants(watchdog)) != servers * (1 + _TREE_PROCESSES):
        if time.monotonic() > limit:
            raise TimeoutError(f"there are {len(pids)} processes")
        time.sleep(_POLL_S)
    keepers = procfs.children(watchdog)
    found = [procfs.stat(pid) for pid in set(pids) - set(keepers)]
    return keepers, [(stat.pid, stat.start_time) for stat in found if stat is not None]


def _idle(pids: list[int], seconds: int) -> tuple[int, float]:
    """Give the context switches and the CPU time in ms of some processes in so many idle seconds."""
    time.sleep(_SETTLE_S)
    switches = sum(map(context_switches, pids))
    cpu_ms = sum(map(_cpu_ms, pids))
    time.sleep(seconds)
    return sum(map(context_switches, pids)) - switches, sum(map(_cpu_ms, pids)) - cpu_ms


def _cpu_ms(pid: int) -> float:
    """Give the CPU time of a process's one thread: /proc/PID/schedstat, in ns (Linux, Documentation/scheduler)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[0]) / 1e6


def _private_mib(pid: int) -> float:
    return private_mib(Path(f"/proc/{pid}/smaps_rollup"))
