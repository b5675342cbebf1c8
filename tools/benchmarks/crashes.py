"""A test process that is killed, or stopped for good, while it has servers: when nothing is left of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import harness
from harness import procfs
from tools.benchmarks import ways
from tools.benchmarks.processes import MILLISECONDS, Ends, cpu_ns, python_program, reaped_ns
from tools.benchmarks.rows import LIMIT, OURS, Row
from tools.benchmarks.runs import Plan, measured, measured_at_once, running

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tools.benchmarks.rows import Settings
    from tools.benchmarks.runs import Run

_SERVERS = 8
_OPTIONS = ("children=2",)
# They exit at once when they are asked to: what is measured is what is added to that.
_PLAN = Plan("", _SERVERS, stop_s=0.0, options=_OPTIONS, then="wait")
_LEFT_AFTER_S = 10.0
_DEADLINE_S = 4.0
_ROUNDS = 7
_STOPS = 10
_ONE_WORKER = ("-n1", "--max-worker-restart=0")
_BY_HAND = f"SIGTERM to each process of {_SERVERS} such trees, known beforehand, which ends them as it does here"


def crashes(settings: Settings) -> list[Row]:
    """Kill pytest; kill a worker of pytest-xdist; stop pytest, which has a deadline."""
    found = _crash("SIGKILL of pytest", settings, _kill)
    if settings.is_quick:
        return found
    found += _crash("SIGKILL of a worker", settings, _kill, *_ONE_WORKER)
    stopped = _crash("SIGSTOP of pytest", settings, _stop)
    return [*_with_reasons([*found, *stopped], settings.scratch), _detection(settings)]


def _with_reasons(rows: Sequence[Row], scratch: Path) -> list[Row]:
    """Say of each time what was measured of its causes."""
    cores = len(os.sched_getaffinity(0))
    cpu_ms = _stop_cpu_ms(scratch)
    keepers = (
        "a root is asked first, and what it leaves once it has exited, by a keeper of its own, in Python: a stop of"
        f" such a tree takes {cpu_ms:.1f} ms of CPU in the keeper and in its own exits, on {cores} cores."
    )
    asked = f"the test process is asked first whether somebody debugs it, and writes its stacks. Then: {keepers}"
    reasons = {"SIGSTOP": asked, "SIGKILL": keepers}
    explained_ms = cpu_ms * _SERVERS / min(cores, _SERVERS)
    return [
        replace(row, reason=reasons[row.name[:7]], explained=explained_ms) if row.unit == "ms" else row for row in rows
    ]


def _stop_cpu_ms(scratch: Path) -> float:
    """Give the CPU time that the stop of one such tree takes, in its keeper and in the tree itself."""
    spent_ns = 0
    with harness.Watchdog(state_dir=scratch / "state") as watchdog, tempfile.TemporaryDirectory(dir=scratch) as folder:
        for number in range(_STOPS):
            paths = [Path(folder, f"server{number}-{one}") for one in range(_SERVERS)]
            with watchdog.group() as group:
                for path in paths:
                    group.launch(python_program("server_tree.py", "0", str(path), *_OPTIONS))
                _wait_for(paths)
                pids = procfs.descendants(watchdog.pid or 0)
                before_ns = reaped_ns(watchdog.pid or 0) + sum(map(cpu_ns, pids))
                group.stop()
                spent_ns += reaped_ns(watchdog.pid or 0) - before_ns
    return spent_ns / 1e6 / _STOPS / _SERVERS


def _wait_for(paths: Sequence[Path]) -> None:
    while not all(path.exists() for path in paths):
        time.sleep(0.005)


def _crash(name: str, settings: Settings, strike: Callable[[Run], float], *options: str) -> list[Row]:
    """Give two rows: the time until nothing is left, and what is left after 10 s."""
    left: dict[str, list[float]] = {LIMIT: [0.0]}

    def measure(scratch: Path, plan: Plan) -> float:
        own = [f"-o=harness_deadline={_DEADLINE_S}"] if strike is _stop and plan.way == OURS else []
        with running(scratch, plan, *options, *own) as run:
            since = strike(run)
            try:
                ended = run.ends.wait(since + _LEFT_AFTER_S - time.monotonic())
            except TimeoutError:
                ended = float("inf")
            left.setdefault(plan.way, []).append(float(run.ends.left()))
            run.process.kill()
        return (ended - since) * MILLISECONDS

    rounds = settings.choose(_ROUNDS, 2)
    samples: dict[str, list[float]] = {OURS: [], LIMIT: []}
    for _ in range(rounds):
        samples[LIMIT].append(_end_by_hand(settings.scratch))
        samples[OURS] += measured(settings.scratch, _PLAN, [OURS], 1, measure)[OURS]
    if not settings.is_quick:
        samples |= measured_at_once(settings.scratch, _PLAN, ways.PEERS, rounds, measure)
    said = "its servers gone" if strike is _kill else "its servers gone, after its deadline"
    return [
        Row(f"{name}: {said}", "ms", samples, _BY_HAND, bound=50.0),
        Row(f"{name}: left after {_LEFT_AFTER_S:.0f} s", "processes", left, "none", bound=1.0),
    ]


def _kill(run: Run) -> float:
    run.signal(signal.SIGKILL)
    return time.monotonic()


def _stop(run: Run) -> float:
    """Stop it; what follows is counted from its deadline."""
    run.signal(signal.SIGSTOP)
    return run.began + _DEADLINE_S


def _detection(settings: Settings) -> Row:
    """Measure when a controller of pytest-xdist knows that its one worker was killed."""

    def measure(scratch: Path, plan: Plan) -> float:
        with running(scratch, plan, *_ONE_WORKER, "-p", "tools.benchmarks.plugin_detects") as run:
            since = _kill(run)
            detected: float = run.told()["detected"]
            return (detected - since) * MILLISECONDS

    plans = {OURS: replace(_PLAN, way=OURS), LIMIT: Plan(LIMIT, 0, then="wait")}
    samples: dict[str, list[float]] = {way: [] for way in plans}
    for _ in range(_ROUNDS):
        for way, plan in plans.items():
            samples[way].append(measure(settings.scratch, plan))
    return Row(
        "pytest-xdist knows of the SIGKILL of its worker",
        "ms",
        samples,
        "the same without servers and without this plugin",
        bound=3.0,
    )


def _end_by_hand(scratch: Path) -> float:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        paths = [Path(folder, f"server{number}") for number in range(_SERVERS)]
        trees = [
            subprocess.Popen(python_program("server_tree.py", "0", str(path), *_OPTIONS), start_new_session=True)
            for path in paths
        ]
        try:
            _wait_for(paths)
            pids = [pid for path in paths for pid in json.loads(path.read_bytes())]
            with contextlib.closing(Ends(pids)) as ends:
                asked = time.monotonic()
                for pid in pids:
                    os.kill(pid, signal.SIGTERM)
                return (ends.wait() - asked) * MILLISECONDS
        finally:
            for tree in trees:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(tree.pid, signal.SIGKILL)
                tree.wait()
