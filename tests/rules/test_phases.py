"""The table of phases, each pair against a table written by hand."""

from __future__ import annotations

import pytest
from rules.grids import cells

from harness.watchdog.phases import TRANSITIONS, Phase, Sign, after

# A dot: nothing changes.
EXPECTED = """
            STARTED  FAILED  EXITED    EMPTY  STUCK       KEEPER_LOST  ASK    KILL
LAUNCHING   RUNNING  GONE    .         GONE   .           LOST         ASKED  KILLED
RUNNING     .        .       DETACHED  GONE   .           LOST         ASKED  KILLED
DETACHED    .        .       .         GONE   .           LOST         ASKED  KILLED
ASKED       .        GONE    .         GONE   .           LOST         .      KILLED
KILLED      .        GONE    .         GONE   UNKILLABLE  LOST         .      .
LOST        .        .       .         GONE   UNKILLABLE  .            .      .
UNKILLABLE  .        GONE    .         GONE   .           LOST         .      .
GONE        .        .       .         .      .           .            .      .
"""


@pytest.mark.parametrize(("phase", "sign", "follows"), cells(EXPECTED))
def test_each_sign_in_each_phase(phase: str, sign: str, follows: str) -> None:
    assert after(Phase[phase], Sign[sign]) is Phase[phase if follows == "." else follows]


def test_every_pair_is_expected_above() -> None:
    assert {(phase, sign) for phase, sign, _ in cells(EXPECTED)} == {(p.name, s.name) for p in Phase for s in Sign}


def test_every_phase_can_be_reached() -> None:
    assert {Phase.LAUNCHING, *TRANSITIONS.values()} == set(Phase)


def test_only_gone_and_unkillable_are_over() -> None:
    assert {phase for phase in Phase if phase.is_over} == {Phase.GONE, Phase.UNKILLABLE}


def test_each_phase_that_is_not_over_can_end() -> None:
    assert all(after(phase, Sign.EMPTY) is Phase.GONE for phase in Phase)
