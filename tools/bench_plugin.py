"""What the plugin costs people who use no server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tools import bench_figures as figures
from tools.bench_processes import MILLISECONDS, TOOLS, run_pytest

if TYPE_CHECKING:
    from tools.bench_figures import Figure, Settings

_TEST = f"{TOOLS / 'bench_case_tests.py'}::test_trivial"
_LIMIT_MS = 40.0


def plugin(settings: Settings) -> list[Figure]:
    """Run pytest on one trivial test, against the same run with `-p no:harness`.

    That is the same pytest without this plugin: the difference is what its import, the fork of the watchdog and its
    end add to every run. Which one goes first alternates.
    """
    with_ms: list[float] = []
    without_ms: list[float] = []
    turns = [(with_ms, ()), (without_ms, ("-p", "no:harness"))]
    for _, options in turns:
        run_pytest(settings.scratch, *options, _TEST)  # warms the file cache
    for _ in range(settings.choose(20, 8)):
        for times_ms, options in turns:
            times_ms.append(run_pytest(settings.scratch, *options, _TEST) * MILLISECONDS)
        turns.reverse()
    return [figures.difference("plugin", "ms", with_ms, without_ms, _LIMIT_MS)]
