"""What a stop reports, and exit codes in words."""

from __future__ import annotations

import json

import pytest

from harness import lease_messages, messages, signals
from harness.errors import GpuNotReleased, Leaked
from harness.outcomes import DeviceRelease, ServerOutcome, StopReport, Survivor, outcome_facts, report_of

WIRE = messages.Stopped(
    [
        messages.Outcome(1, "a", 101, "asked", 0, 0.25, [], "", [], 1.5),
        messages.Outcome(
            2,
            "b",
            102,
            "unkillable",
            None,
            5.0,
            [messages.Survivor(103, "D", "nfs_wait", "program x")],
            "its deadline of 5 s has passed",
            [],
            None,
        ),
    ],
    5.5,
)


def test_a_report_is_made_from_the_watchdogs() -> None:
    stuck = Survivor(103, "D", "nfs_wait", "program x")
    report = report_of(WIRE)
    assert report == StopReport(
        (
            ServerOutcome("a", 101, "asked", 0, 0.25, exited_at=1.5),
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


WIRE_ROW = lease_messages.DeviceRelease(
    uuid="GPU-1",
    index=0,
    verdict="held",
    baseline_mib=0,
    peak_mib=900,
    now_mib=512,
    own=[lease_messages.GpuProcess(103, 512, "vllm serve")],
    foreign=[lease_messages.GpuProcess(104, None, "")],
    waited_s=60.0,
    freed_at=None,
    note="why",
)
FREED = lease_messages.DeviceRelease("GPU-2", 1, "freed", None, None, None, [], [], 0.1, 7.0, "")


def stopped_with(*rows: lease_messages.DeviceRelease) -> StopReport:
    return report_of(
        messages.Stopped([messages.Outcome(1, "a", 101, "asked", 0, 0.25, [], "", list(rows), None)], 60.0)
    )


def test_memory_that_is_held_is_a_leak_that_names_who_holds_what() -> None:
    report = stopped_with(WIRE_ROW, FREED)
    assert report.gpu is not None
    assert (report.gpu.verdict, report.gpu.is_freed, report.is_clean) == ("held", False, False)
    assert report.outcomes[0].gpu == report.gpu.devices
    with pytest.raises(GpuNotReleased) as caught:
        report.raise_if_leaked()
    assert str(caught.value).splitlines()[1:] == [
        "  'a': GPU 0 (GPU-1): held after 60.000 s, 512 MiB now, 0 MiB before, 900 MiB at most; why",
        "    of the server: pid 103, 512 MiB: vllm serve",
        "    of another, since: pid 104, ? MiB: ?",
    ]


def test_memory_that_is_back_or_unknown_is_no_leak() -> None:
    unknown = WIRE_ROW.replaced(verdict="unknown")
    for rows, verdict in (([FREED], "freed"), ([FREED, unknown], "unknown")):
        report = stopped_with(*rows)
        report.raise_if_leaked()
        assert report.is_clean
        assert report.gpu is not None
        assert report.gpu.verdict == verdict
    assert str(report_row(FREED)) == "GPU 1 (GPU-2): freed after 0.100 s, ? MiB now, ? MiB before, ? MiB at most"


def report_row(row: lease_messages.DeviceRelease) -> DeviceRelease:
    return stopped_with(row).outcomes[0].gpu[0]


def test_what_a_report_says_of_an_outcome_is_json() -> None:
    device = DeviceRelease("GPU-1", 0, "held", 1, 2, 3, waited_s=4.0)
    survivor = Survivor(7, "D", "nfs_wait", "python")
    outcome = ServerOutcome("web", 5, "unkillable", None, 1.5, (survivor,), "its deadline", (device,))
    facts = outcome_facts(outcome)
    assert json.loads(json.dumps(facts)) == {
        "how": "unkillable",
        "returncode": None,
        "seconds": 1.5,
        "reason": "its deadline",
        "survivors": [7],
        "gpu": [{"uuid": "GPU-1", "verdict": "held", "seconds": 4.0}],
    }
