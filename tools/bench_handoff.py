"""How fast the GPU store goes from one broker to the next, and how fairly, while sixteen want it."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, NamedTuple

from tools import bench_figures as figures
from tools.bench_processes import MILLISECONDS, TOOLS

if TYPE_CHECKING:
    from tools.bench_figures import Figure, Settings

_PROCESSES = 16
_LIMIT_MS = 8.0
# What polling costs at most, beside a lock that the kernel hands over.
_POLLING_LIMIT_MS = 3.0
# Each has at least half of what would be fair.
_SHARE_LIMIT = 2.0
_RUN_LIMIT_S = 60.0


class _Crowd(NamedTuple):
    """What came of one run."""

    handoff_ms: float
    fair_by_lowest: float
    lost: int


def handoff(settings: Settings) -> list[Figure]:
    """Have 16 processes change the store, as fast as they can, and measure from each change's end to the next's begin.

    The peer is a lock that is waited for in the kernel (flock(2)), with the same content in one file that a killed
    writer would tear. It knows no time limit, so it cannot tell whose lock it waits for.
    """
    rounds = settings.choose(7, 3)
    seconds = settings.choose(3, 1)
    pairs = [(_run("store", seconds, settings), _run("flock", seconds, settings)) for _ in range(rounds)]
    ours = [our for our, _ in pairs]
    handoffs_ms = [our.handoff_ms for our in ours]
    name = f"handoff-{_PROCESSES}"
    return [
        figures.plain(f"{name} median", "ms", handoffs_ms, _LIMIT_MS),
        figures.difference(
            f"{name} against flock(2)", "ms", handoffs_ms, [peer.handoff_ms for _, peer in pairs], _POLLING_LIMIT_MS
        ),
        figures.plain(f"{name} fair share / lowest", "times", [max(our.fair_by_lowest for our in ours)], _SHARE_LIMIT),
        figures.plain(f"{name} lost updates", "updates", [sum(our.lost for our in ours)], 0.0),
    ]


def _run(mode: str, seconds: int, settings: Settings) -> _Crowd:
    directory = tempfile.mkdtemp(prefix="store-", dir=settings.scratch)
    command = [sys.executable, "-m", "tools.bench_case_handoff", mode, directory, str(_PROCESSES), str(seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=_RUN_LIMIT_S, cwd=TOOLS.parent)
    said = json.loads(done.stdout)
    counts = said["counts"]
    return _Crowd(
        handoff_ms=statistics.median(said["handoffs_s"]) * MILLISECONDS,
        fair_by_lowest=sum(counts) / len(counts) / max(1, min(counts)),
        lost=sum(counts) - sum(said["content"]["counts"].values()),
    )
