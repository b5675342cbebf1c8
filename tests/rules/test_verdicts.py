"""One reading against the baseline: whose memory is there, and what is said where that cannot be told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.broker.readings import Fault, Reading
from harness.broker.verdicts import SLACK_BYTES, Judgement, judge

GIB = 1 << 30
OWN, NEIGHBOUR, STRANGER, RESIDENT = 100, 200, 900, 50
EMPTY = Reading(0, 80 * GIB, 2, {})


def reading(used_bytes: int, processes: dict[int, int | None] | None) -> Reading:
    return Reading(used_bytes, 80 * GIB, 2, processes)


def judged(
    now: Reading | Fault,
    baseline: Reading = EMPTY,
    *,
    own: frozenset[int] = frozenset({OWN}),
    neighbours: frozenset[int] = frozenset(),
    sees_pids: bool = True,
    is_shared: bool = False,
) -> Judgement:
    return judge(baseline, now, own=own, neighbours=neighbours, sees_pids=sees_pids, is_shared=is_shared)


def test_a_baseline_of_exactly_nothing_is_one() -> None:
    assert judged(EMPTY) == Judgement("freed", (), (), 0, "")


@pytest.mark.parametrize(("excess_bytes", "verdict"), [(SLACK_BYTES, "freed"), (SLACK_BYTES + 1, "held")])
@pytest.mark.parametrize("resident_bytes", [0, GIB])
def test_the_slack_is_what_may_be_left_and_no_byte_more(excess_bytes: int, verdict: str, resident_bytes: int) -> None:
    listed = {RESIDENT: resident_bytes} if resident_bytes else {}
    found = judged(reading(resident_bytes + excess_bytes, dict(listed)), reading(resident_bytes, dict(listed)))
    assert (found.verdict, found.excess_bytes) == (verdict, excess_bytes)
    assert found.note == ("" if verdict == "freed" else "no process that is listed, and lives, holds it")


def test_another_slack_can_be_asked_for() -> None:
    found = judge(EMPTY, reading(10, {}), own=set(), neighbours=set(), sees_pids=True, is_shared=False, slack_bytes=9)
    assert found.verdict == "held"


@pytest.mark.parametrize("used_bytes", [0, 5 * GIB])
def test_memory_is_held_as_long_as_a_process_of_the_server_is_listed(used_bytes: int) -> None:
    """Also when the device has no more in use than before: it may be about to take some."""
    found = judged(reading(used_bytes, {OWN: used_bytes}))
    assert (found.verdict, found.own, found.excess_bytes) == ("held", (OWN,), used_bytes)


def test_what_its_listed_processes_hold_is_what_is_held_whatever_strangers_do() -> None:
    now = reading(9 * GIB, {OWN + 1: 2 * GIB, OWN: GIB, STRANGER: 6 * GIB})
    found = judged(now, own=frozenset({OWN, OWN + 1, OWN + 2}))
    assert found == Judgement("held", (OWN, OWN + 1), (STRANGER,), 3 * GIB, "")


def test_where_it_is_not_told_what_its_processes_hold_totals_are_said() -> None:
    found = judged(reading(3 * GIB, {OWN: None, OWN + 1: GIB}), own=frozenset({OWN, OWN + 1}))
    assert (found.verdict, found.own, found.excess_bytes) == ("held", (OWN, OWN + 1), 3 * GIB)


def test_a_stranger_who_takes_memory_meanwhile_makes_no_leak() -> None:
    found = judged(reading(5 * GIB, {STRANGER: 5 * GIB}))
    assert found == Judgement("freed", (), (STRANGER,), 0, "")


def test_a_stranger_who_gives_memory_back_meanwhile_hides_no_leak() -> None:
    found = judged(reading(3 * GIB, {}), reading(10 * GIB, {RESIDENT: 10 * GIB}))
    assert (found.verdict, found.excess_bytes) == ("held", 3 * GIB)


def test_who_was_there_before_is_no_stranger_and_may_grow() -> None:
    found = judged(reading(9 * GIB, {RESIDENT: 9 * GIB}), reading(GIB, {RESIDENT: GIB}))
    assert (found.verdict, found.foreign) == ("freed", ())


def test_neighbours_are_no_strangers_and_neither_make_nor_hide_a_leak() -> None:
    grown = reading(9 * GIB, {NEIGHBOUR: 9 * GIB})
    assert judged(grown, neighbours=frozenset({NEIGHBOUR}), is_shared=True) == Judgement("freed", (), (), 0, "")
    leaking = reading(12 * GIB, {NEIGHBOUR: 9 * GIB})
    found = judged(leaking, neighbours=frozenset({NEIGHBOUR}), is_shared=True)
    assert (found.verdict, found.excess_bytes) == ("held", 3 * GIB)


# ---- where it is not told which process holds what

UNTOLD = "the driver does not say which process holds what, so the device's total was compared"


@pytest.mark.parametrize("processes", [None, {STRANGER: None}, {STRANGER: GIB, RESIDENT: None}])
def test_without_each_process_memory_totals_decide_and_that_is_said(processes: dict[int, int | None] | None) -> None:
    found = judged(reading(SLACK_BYTES, processes), reading(0, None))
    assert (found.verdict, found.excess_bytes, found.note) == ("freed", SLACK_BYTES, UNTOLD)


def test_one_of_two_readings_that_does_not_tell_is_enough() -> None:
    assert judged(EMPTY, reading(0, None)).note == UNTOLD
    assert judged(reading(0, None), EMPTY).note == UNTOLD


def test_a_device_that_does_not_list_the_server_is_judged_by_totals() -> None:
    """In a PID namespace the list is empty: that nobody of the server is on it means nothing."""
    assert judged(reading(0, {}), sees_pids=False) == Judgement("freed", (), (), 0, UNTOLD)
    found = judged(reading(GIB, {}), sees_pids=False)
    assert (found.verdict, found.excess_bytes) == ("held", GIB)
    assert found.note == f"{UNTOLD}; it cannot be told whose it is"


def test_totals_that_are_back_prove_nothing_where_others_had_memory_before() -> None:
    """They may have given back as much as the server has left behind."""
    found = judged(reading(GIB, None), reading(GIB, None))
    assert found.verdict == "unknown"
    assert found.note.endswith("others had memory on it before, and may have given that back")
    assert judged(reading(SLACK_BYTES, None), reading(SLACK_BYTES, None)).verdict == "freed"


@pytest.mark.parametrize(
    ("why", "now", "baseline", "is_shared"),
    [
        ("others have leased a part of it", reading(GIB, None), reading(0, None), True),
        ("others have come meanwhile", reading(GIB, {STRANGER: None}), EMPTY, False),
        (
            "others had memory on it before, and may have taken more",
            reading(2 * GIB, {RESIDENT: None}),
            reading(0, {RESIDENT: None}),
            False,
        ),
    ],
)
def test_totals_that_others_may_have_raised_tell_nothing(
    why: str, now: Reading, baseline: Reading, *, is_shared: bool
) -> None:
    found = judged(now, baseline, is_shared=is_shared)
    assert found.verdict == "unknown"
    assert found.note == f"{UNTOLD}, and that does not tell: {why}"


def test_a_neighbour_is_no_stranger_to_totals_either() -> None:
    found = judged(reading(GIB, {NEIGHBOUR: None}), neighbours=frozenset({NEIGHBOUR}))
    assert (found.verdict, found.foreign) == ("held", ())


# ---- where there is nothing to compare


@pytest.mark.parametrize("kind", ["unknown", "lost"])
def test_a_fault_tells_nothing_and_says_why(kind: str) -> None:
    assert judged(Fault(kind, "GPU is lost")) == Judgement("unknown", (), (), 0, "GPU is lost")


def test_memory_that_was_read_in_two_ways_is_not_compared() -> None:
    """The first form counts the driver's own reserve as used, hundreds of MiB of an idle device."""
    found = judged(replace(EMPTY, version=1))
    assert (found.verdict, found.note) == ("unknown", "its memory was read in two ways that cannot be compared")
