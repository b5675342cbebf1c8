"""Servers that fork faster than they can be listed: nothing of them survives, and nobody else is harmed."""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import processes
import pytest

import harness

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = Path(__file__).parents[1] / "servers" / "storm.py"
# Each process of a storm ends by itself after this time: no stop may need it.
LIFE_S = 30
STORMS = pytest.mark.parametrize("size", [("chains", 40), ("bomb", 300)], ids=["chains", "bomb"])


class Storm:
    """A storm, and a FIFO that all its processes hold open: no scan of /proc can follow chains that hop."""

    def __init__(self, directory: Path) -> None:
        self._fifo = directory / "storm.fifo"
        os.mkfifo(self._fifo)
        self._descriptor = os.open(self._fifo, os.O_RDONLY | os.O_NONBLOCK)

    def launch(self, watchdog: harness.Watchdog, kind: str, count: int, *more: str) -> harness.Server:
        command = [sys.executable, "-I", "-S", str(PROGRAM), kind, str(count), str(LIFE_S), str(self._fifo), *more]
        server = watchdog.launch(command, ready=harness.log_line("ready"), grace_s=0.2).wait_ready(timeout_s=60)
        assert not self.is_over(0.0)
        return server

    def is_over(self, timeout_s: float) -> bool:
        """Say whether no process of it is left, waiting for that at most `timeout_s`."""
        poll = select.poll()
        poll.register(self._descriptor, 0)  # POLLHUP is always told: nobody has it open for writing
        return bool(poll.poll(timeout_s * 1000))

    def close(self) -> None:
        os.close(self._descriptor)


@pytest.fixture
def storm(tmp_path: Path) -> Iterator[Storm]:
    made = Storm(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("cores", ["all", "one"])
@STORMS
def test_a_storm_is_ended(guarded: harness.Watchdog, storm: Storm, size: tuple[str, int], cores: str) -> None:
    if cores == "one":  # the keeper has to share it with the storm
        os.sched_setaffinity(guarded.pid or 0, {min(os.sched_getaffinity(0))})
    quiet = guarded.launch(["sleep", "1000"])
    outcome = storm.launch(guarded, *size).stop()
    assert storm.is_over(0.0)
    assert (outcome.how, outcome.survivors) == ("killed", ())
    assert outcome.seconds < LIFE_S / 2
    assert quiet.is_alive


@pytest.mark.parametrize("cores", ["all", "one"])
@pytest.mark.parametrize("killed", ["watchdog", "keeper"])
@STORMS
def test_a_storm_is_ended_by_those_who_are_left(
    guarded: harness.Watchdog, storm: Storm, size: tuple[str, int], killed: str, cores: str
) -> None:
    if cores == "one":
        os.sched_setaffinity(guarded.pid or 0, {min(os.sched_getaffinity(0))})
    server = storm.launch(guarded, *size)
    os.kill(guarded.pid or 0 if killed == "watchdog" else processes.parent(server.pid), signal.SIGKILL)
    assert storm.is_over(LIFE_S / 2)
