"""Judges a trial: waits until nothing of it is left, says what is, and runs the sweep that may be needed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from harness import procfs
from tools import chaos_count
from tools.chaos_people import Person
from tools.chaos_steps import WORKER

if TYPE_CHECKING:
    from tools.chaos_count import Place
    from tools.chaos_people import People

_ROOT = Path(__file__).parent.parent
_DESCRIBED = 40
_SWEEP_LIMIT_S = 30.0
_SWEPT = (0, 1)  # nothing was found, something was found
_POLL_S = 0.02
_SLICE_S = 0.5
_SHOWN_CHARACTERS = 160


def end_test_processes(place: Place, people: People, deadline: float) -> None:
    """Kill the workers of a dead controller once their servers are gone: execnet lets them live on for 5 to 15 s."""
    while time.monotonic() < deadline:
        left = set(place.pids())
        if not left - people.test_processes:
            break
        chaos_count.wait_for(place, _POLL_S)
    for pid in people.test_processes & set(place.pids()):
        with contextlib.suppress(ProcessLookupError):
            worker = Person(pid, WORKER)
            if pid in place.pids():
                worker.send(signal.SIGKILL)
            worker.close()


def wait_empty(place: Place, deadline: float) -> float | None:
    """Wait until nothing is left; give the monotonic time of that, None if it does not come by the deadline."""
    while place.pids():
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            return None
        chaos_count.wait_for(place, min(remaining_s, _SLICE_S))
    return time.monotonic()


def has_sweep() -> bool:
    """Say whether the product has the sweep that is promised for a killed watchdog and a killed keeper."""
    return importlib.util.find_spec("harness.__main__") is not None


def sweep(state: Path) -> bool:
    """Run the sweep; False if there is none yet. Raises RuntimeError, with what it says, if it fails."""
    if not has_sweep():
        return False
    done = subprocess.run(
        [sys.executable, "-m", "harness", "sweep", "--yes"],
        cwd=_ROOT,
        env={**os.environ, "HARNESS_STATE_DIR": str(state)},
        check=False,
        capture_output=True,
        text=True,
        timeout=_SWEEP_LIMIT_S,
    )
    if done.returncode not in _SWEPT:
        raise RuntimeError(f"the sweep has failed: {done.stdout[-500:]}{done.stderr[-500:]}")
    return True


def describe(place: Place, people: People) -> list[str]:
    """Describe what is left, some of it if that is much."""
    found = [stat for stat in map(procfs.stat, place.pids()[:_DESCRIBED]) if stat is not None]
    return [
        f"{stat.pid} (parent {stat.parent}, state {stat.state}, {_role(stat.pid, people)}):"
        f" {procfs.command_line(stat.pid)[:_SHOWN_CHARACTERS]}"
        for stat in found
    ]


def _role(pid: int, people: People) -> str:
    if pid in people.test_processes:
        return "test process"
    line = procfs.command_line(pid)
    if "chaos_boot.py" in line or " pytest " in line:
        return "watchdog or keeper"  # a watchdog that was forked, and has not executed its program, looks like pytest
    return "server"
