"""Servers that fork faster than they can be listed: nothing of them survives, and nobody else is harmed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import harness

STORM = Path(__file__).parents[1] / "servers" / "storm.py"
# Each process of a storm ends by itself after this time: no stop may need it.
LIFE_S = 30


@pytest.mark.parametrize("cores", ["all", "one"])
@pytest.mark.parametrize(("kind", "count"), [("chains", 40), ("bomb", 300)])
def test_a_storm_is_ended(guarded: harness.Watchdog, kind: str, count: int, cores: str) -> None:
    if cores == "one":  # the keeper has to share it with the storm
        os.sched_setaffinity(guarded.pid or 0, {min(os.sched_getaffinity(0))})
    command = [sys.executable, "-I", "-S", str(STORM), kind, str(count), str(LIFE_S)]
    quiet = guarded.launch(["sleep", "1000"])
    storm = guarded.launch(command, ready=harness.log_line("ready"), grace_s=0.2).wait_ready(timeout_s=60)
    outcome = storm.stop()
    assert (outcome.how, outcome.survivors) == ("killed", ())
    assert outcome.seconds < LIFE_S / 2
    assert quiet.is_alive
