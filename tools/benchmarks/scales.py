"""Hundreds of servers in one watchdog: whether a server costs the same among many as among few."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import harness
from harness import procfs
from tools.benchmarks.processes import MILLISECONDS, Ends, context_switches, cpu_ns, private_mib, reaped_ns
from tools.benchmarks.rows import LIMIT, OURS, Row

if TYPE_CHECKING:
    from collections.abc import Callable

    from tools.benchmarks.rows import Settings

# A root, four workers and a daemon; all of them ignore SIGTERM.
_TREE = "trap '' TERM; (setsid sleep 600 &); for _ in 1 2 3 4; do sleep 600 & done; echo ready; wait"
_COMMAND = ["sh", "-c", _TREE]
_TREE_PROCESSES = 6
_GRACE_S = 1.0
_READY_S = 120.0
_SETTLE_S = 1.0
_POLL_S = 0.1
_LINEAR_FACTOR = 1.5
_LINEAR = f"up to {_LINEAR_FACTOR} times that counts as linear"
_STEPS = 4
_BY_HAND = "kill -9 of all these processes, known beforehand"


class _Scale(NamedTuple):
    """What some number of servers cost."""

    launch_ms: float
    stop_ms: float
    watchdog_mib: float
    switches: float
    cpu_ms: float


def scale(settings: Settings) -> list[Row]:
    """Launch 50 to 500 servers of 6 processes that ignore SIGTERM, leave them idle, and stop them as one group."""
    counts = (20, 60) if settings.is_quick else (50, 200, 350, 500)
    rounds, idle_s = settings.choose(7, 1), settings.choose(2, 1)
    ours: dict[int, list[_Scale]] = {count: [] for count in counts}
    by_hand: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            ours[count].append(_measure(settings.scratch, count, idle_s))
            by_hand[count].append(_kill_by_hand(count))
    return [*(_kill_row(count, ours[count], by_hand[count]) for count in counts), *_linear_rows(ours, idle_s)]


def _kill_row(count: int, ours: list[_Scale], by_hand: list[float]) -> Row:
    samples = {OURS: [one.stop_ms for one in ours], LIMIT: by_hand}
    each_ms = statistics.median(one.cpu_ms for one in ours)
    cores = len(os.sched_getaffinity(0))
    reason = (
        "each server has a keeper, a Python process that wakes up, kills, reaps until nothing is left, exits: in the"
        f" stop it and the exits of its tree take {each_ms:.2f} ms of CPU for each server, on {cores} cores."
    )
    name = f"stop of {count} servers of 6 processes, after their grace"
    return Row(name, "ms", samples, _BY_HAND, 30.0, reason, each_ms * count / cores)


def _linear_rows(ours: dict[int, list[_Scale]], idle_s: int) -> list[Row]:
    few, many = min(ours), max(ours)

    def row(what: str, get: Callable[[_Scale], float]) -> Row:
        samples = {OURS: [get(one) / many for one in ours[many]], LIMIT: [get(one) / few for one in ours[few]]}
        limit = f"the same for each of {few}; {_LINEAR}"
        return Row(f"{what}, for each of {many} servers", "ms each", samples, limit, 5.0, factor=_LINEAR_FACTOR)

    switches = {OURS: [one.switches for one in ours[many]], LIMIT: [0.0]}
    idle = Row(f"switches of a watchdog and {many} keepers in {idle_s} s", "switches", switches, "none", bound=1.0)
    found = [row("launch", lambda one: one.launch_ms), row("stop after the grace", lambda one: one.stop_ms), idle]
    return found if len(ours) < _STEPS else [*found, _memory_row(ours)]


def _memory_row(ours: dict[int, list[_Scale]]) -> Row:
    """Hold what each server adds among many to what it adds among few: the watchdog itself is in both."""
    few, more, _, many = sorted(ours)
    mib = {count: [one.watchdog_mib for one in found] for count, found in ours.items()}
    added = {
        OURS: [(b - a) / (many - more) for a, b in zip(mib[more], mib[many], strict=True)],
        LIMIT: [(b - a) / (more - few) for a, b in zip(mib[few], mib[more], strict=True)],
    }
    limit = f"the same between {few} and {more}; {_LINEAR}"
    name = f"memory of the watchdog, for each server between {more} and {many}"
    return Row(name, "MiB", added, limit, bound=float("inf"), factor=_LINEAR_FACTOR)


def _measure(scratch: Path, servers: int, idle_s: int) -> _Scale:
    with harness.Watchdog(state_dir=scratch / "state") as watchdog, watchdog.group("scale") as group:
        began = time.monotonic()
        for _ in range(servers):
            group.launch(_COMMAND, ready=harness.log_line("ready"), grace_s=_GRACE_S)
        launched = time.monotonic()
        group.wait_ready(timeout_s=_READY_S)
        keepers, everybody = _processes(watchdog.pid or 0, servers)
        switches = _switches([watchdog.pid or 0, *keepers], idle_s)
        watchdog_mib = private_mib(Path(f"/proc/{watchdog.pid}/smaps_rollup"))
        before_ns = reaped_ns(watchdog.pid or 0) + sum(map(cpu_ns, [*keepers, *(pid for pid, _ in everybody)]))
        called = time.monotonic()
        report = group.stop()
        stop_s = time.monotonic() - called - _GRACE_S
        cpu_ms = (reaped_ns(watchdog.pid or 0) - before_ns) / 1e6 / servers
        survivors = [pid for pid, start_time in everybody if procfs.is_alive(pid, start_time)]
    if survivors or any(outcome.how != "killed" for outcome in report.outcomes):
        raise RuntimeError(f"the servers were not stopped as they should be: {survivors}, {report}")
    launch_ms = (launched - began) * MILLISECONDS
    return _Scale(launch_ms, stop_s * MILLISECONDS, watchdog_mib, float(switches), cpu_ms)


def _processes(watchdog: int, servers: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Wait until all processes are there; give the keepers, and every server's process with its start time."""
    pids = _descendants(watchdog, servers * (1 + _TREE_PROCESSES))
    keepers = procfs.children(watchdog)
    found = [procfs.stat(pid) for pid in set(pids) - set(keepers)]
    return keepers, [(stat.pid, stat.start_time) for stat in found if stat is not None]


def _descendants(pid: int, count: int) -> list[int]:
    limit = time.monotonic() + _READY_S
    while len(pids := procfs.descendants(pid)) != count:
        if time.monotonic() > limit:
            raise TimeoutError(f"there are {len(pids)} processes, not {count}")
        time.sleep(_POLL_S)
    return pids


def _switches(pids: list[int], seconds: int) -> int:
    """Give the context switches of some processes in so many idle seconds."""
    time.sleep(_SETTLE_S)
    counts = []
    for _ in range(2):  # what still settles on a busy machine has done so in the second
        before = sum(map(context_switches, pids))
        time.sleep(seconds)
        counts.append(sum(map(context_switches, pids)) - before)
    return min(counts)


def _kill_by_hand(servers: int) -> float:
    """Launch such trees below one shell, so that all of their processes can be counted; kill them one by one."""
    # The daemons of these stay where they are: a subreaper is what keeps ours.
    tree = _TREE.replace("(setsid sleep 600 &);", "sleep 600 &")
    code = f'for _ in $(seq {servers}); do sh -c "$0" >/dev/null & done; wait'
    command = [*_COMMAND[:2], code, tree]
    with subprocess.Popen(command, start_new_session=True) as shell:
        try:
            pids = _descendants(shell.pid, servers * _TREE_PROCESSES)
            with contextlib.closing(Ends(pids)) as ends:
                killed = time.monotonic()
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                return (ends.wait() - killed) * MILLISECONDS
        finally:
            os.killpg(shell.pid, signal.SIGKILL)  # the shell, which has not been reaped, and all below it
