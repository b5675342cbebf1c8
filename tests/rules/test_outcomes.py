"""What a stop reports, and exit codes in words."""

from __future__ import annotations

import pytest

from harness import messages, signals
from harness.errors import Leaked
from harness.outcomes import ServerOutcome, StopReport, Survivor, report_of

WIRE = messages.Stopped(
    [
        messages.Outcome(1, "a", 101, "asked", 0, 0.25, [], ""),
        messages.Outcome(
            2,
            "b",
            102,
            "unkillable",
            None,
            5.0,
            [messages.Survivor(103, "D", "nfs_wait", "program x")],
            "its deadline of 5 s has passed",
        ),
    ],
    5.5,
)


def test_a_report_is_made_from_the_watchdogs() -> None:
    stuck = Survivor(103, "D", "nfs_wait", "program x")
    report = report_of(WIRE)
    assert report == StopReport(
        (
            ServerOutcome("a", 101, "asked", 0, 0.25),
            ServerOutcome("b", 102, "unkillable", None, 5.0, (stuck,), "its deadline of 5 s has passed"),
        ),
        5.5,
    )
    assert report.survivors == (stuck,)
    assert report.gpu is None


def test_a_leak_names_the_server_and_every_survivor() -> None:
    report = report_of(WIRE)
    assert not report.is_clean
    with pytest.raises(Leaked) as caught:
        report.raise_if_leaked()
    assert str(caught.value).splitlines()[1:] == [
        "'b' (pid 102): unkillable, exit code unknown, 5.000 s, since its deadline of 5 s has passed",
        "  pid 103 in state D at nfs_wait: program x",
    ]


def test_a_leak_whose_survivors_ended_before_they_were_described_is_still_a_leak() -> None:
    report = StopReport((ServerOutcome("a", 101, "unkillable", None, 5.0),), 5.0)
    with pytest.raises(Leaked, match="'a'"):
        report.raise_if_leaked()


@pytest.mark.parametrize("how", ["exited", "asked", "killed"])
def test_a_stop_that_left_nothing_is_clean(how: str) -> None:
    report = StopReport((ServerOutcome("a", 101, how, -9, 1.0),), 1.0)
    assert report.is_clean
    report.raise_if_leaked()


def test_a_stop_of_nothing_is_clean() -> None:
    assert StopReport((), 0.0).is_clean


def test_what_is_not_known_of_a_survivor_is_a_question_mark() -> None:
    assert str(Survivor(103, "D", "", "")) == "pid 103 in state D at ?: ?"


@pytest.mark.parametrize(
    ("returncode", "words"),
    [
        (None, "exit code unknown"),
        (0, "exit code 0"),
        (255, "exit code 255"),
        (-9, "killed by SIGKILL"),
        (-15, "killed by SIGTERM"),
        (-63, "killed by signal 63"),
        (-1000, "killed by signal 1000"),
    ],
)
def test_exit_codes_in_words(returncode: int | None, words: str) -> None:
    assert signals.describe(returncode) == words
