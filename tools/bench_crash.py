"""What a SIGKILL of the test process costs, against killing its servers by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING

from harness import procfs
from tools import bench_figures as figures
from tools.bench_processes import MILLISECONDS, TOOLS, Ends, environment, pytest_command

if TYPE_CHECKING:
    from pathlib import Path

    from tools.bench_figures import Figure, Settings

_SERVERS = 8
# A root and two children; none of them handles SIGTERM.
_TREE = ["sh", "-c", "sleep 1000 & sleep 1000 & wait"]
_TREE_PROCESSES = 3
_LIMIT_MS = 15.0


def crash_8(settings: Settings) -> list[Figure]:
    """SIGKILL pytest with 8 server trees: the time until all their processes are gone, against `kill -9` of such trees.

    Nothing is faster than one killpg for each tree by somebody who waits for nothing else. Processes are seen to end
    through pidfds that were opened before.
    """
    crashes_ms, kills_ms = [], []
    for _ in range(settings.choose(9, 5)):
        kills_ms.append(_kill_by_hand() * MILLISECONDS)
        crashes_ms.append(_crash(settings.scratch) * MILLISECONDS)
    return [figures.difference("crash-8", "ms", crashes_ms, kills_ms, _LIMIT_MS)]


def _crash(scratch: Path) -> float:
    read_end, write_end = os.pipe()
    settings = {
        "BENCH_TREE": json.dumps([_TREE, _TREE_PROCESSES]),
        "BENCH_SERVERS": str(_SERVERS),
        "BENCH_PIPE": str(write_end),
    }
    with (
        open(scratch / "crash.log", "w+", encoding="utf-8") as log,
        subprocess.Popen(
            pytest_command(scratch, str(TOOLS / "bench_case_crash.py")),
            env=environment(scratch, **settings),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[write_end],
        ) as run,
    ):
        os.close(write_end)
        try:
            with open(read_end, encoding="ascii") as told:
                line = told.readline()
            if not line:
                raise RuntimeError(f"pytest has failed:\n{(scratch / 'crash.log').read_text(encoding='utf-8')}")
            watchdog, pids = json.loads(line)
            watchdog_end, ends = Ends([watchdog]), Ends(pids)
            killed = time.monotonic()
            run.kill()
            seconds = ends.wait() - killed
            watchdog_end.wait()
            return seconds
        finally:
            run.kill()


def _kill_by_hand() -> float:
    trees = [subprocess.Popen(_TREE, start_new_session=True) for _ in range(_SERVERS)]
    try:
        while any(len(_tree_of(tree)) < _TREE_PROCESSES for tree in trees):
            time.sleep(0.005)
        ends = Ends(pid for tree in trees for pid in _tree_of(tree))
    finally:
        killed = time.monotonic()
        for tree in trees:
            os.killpg(tree.pid, signal.SIGKILL)
    seconds = ends.wait() - killed
    for tree in trees:
        tree.wait()
    return seconds


def _tree_of(tree: subprocess.Popen[bytes]) -> list[int]:
    return [tree.pid, *procfs.descendants(tree.pid)]
