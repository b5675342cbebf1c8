"""How fast the GPU store goes from one broker to the next, and how fairly, while sixteen want it."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, NamedTuple

from tools.benchmarks.processes import MILLISECONDS, ROOT
from tools.benchmarks.rows import LIMIT, OURS, Row

if TYPE_CHECKING:
    from tools.benchmarks.rows import Settings

_PROCESSES = 16
_RUN_LIMIT_S = 60.0


class _Crowd(NamedTuple):
    """What came of one run."""

    handoff_ms: float
    fair_by_lowest: float
    lost: int


def handoff(settings: Settings) -> list[Row]:
    """Have 16 processes change the store, as fast as they can, and measure from each change's end to the next's begin.

    The limit is a lock that is waited for in the kernel (flock(2)), with the same content in one file that a killed
    writer would tear. It knows no time limit, so it cannot tell whose lock it waits for.
    """
    rounds, seconds = settings.choose(7, 2), settings.choose(3, 1)
    modes = {OURS: "store", LIMIT: "flock"} | ({} if settings.is_quick else {"filelock": "filelock"})
    found: dict[str, list[_Crowd]] = {way: [] for way in modes}
    for _ in range(rounds):
        for way, mode in modes.items():
            found[way].append(_run(mode, seconds, settings))
    name = f"baselines handed on among {_PROCESSES}"
    times_ms = {way: [one.handoff_ms for one in crowds] for way, crowds in found.items()}
    shares = {way: [one.fair_by_lowest for one in crowds] for way, crowds in found.items()}
    lost = {way: [float(one.lost) for one in crowds] for way, crowds in found.items()}
    chance = "tries come after random pauses, so that nobody is always behind another; shares differ from run to run."
    kernel = "flock(2), which the kernel hands on"
    return [
        Row(name, "ms", times_ms, kernel, bound=100.0),
        Row(f"{name}: a fair share by the lowest", "times", shares, kernel, 10.0, chance),
        Row(f"{name}: lost changes", "changes", lost, kernel, bound=1.0),
    ]


def _run(mode: str, seconds: int, settings: Settings) -> _Crowd:
    directory = tempfile.mkdtemp(prefix="store-", dir=settings.scratch)
    command = [sys.executable, "-m", "tools.benchmarks.case_handoff", mode, directory, str(_PROCESSES), str(seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=_RUN_LIMIT_S, cwd=ROOT)
    said = json.loads(done.stdout)
    counts = said["counts"]
    return _Crowd(
        handoff_ms=statistics.median(said["handoffs_s"]) * MILLISECONDS,
        fair_by_lowest=sum(counts) / len(counts) / max(1, min(counts)),
        lost=sum(counts) - sum(said["content"]["counts"].values()),
    )
