"""How the memory of a device comes back, reading by reading: when it is free, and what is said if it is not."""

from __future__ import annotations

import pytest

from harness.broker.readings import Fault, Read, Reading
from harness.broker.releases import ANSWER_S, LONGEST_PAUSE_S, UNTELLABLE_S, Others, Release, pause_s, sample_s

GIB = 1 << 30
OWN, STRANGER = 100, 900
LIMIT_S = 60.0
EMPTY = Reading(0, 80 * GIB, 2, {})
BUSY = Reading(10 * GIB, 80 * GIB, 2, {OWN: 10 * GIB})
UNLISTED = Reading(10 * GIB, 80 * GIB, 2, {})
TOTALS = Reading(10 * GIB, 80 * GIB, 2, None)
HANGS = Fault("unknown", "it failed")
LOST = Fault("lost", "GPU is lost")


def feed(release: Release, reading: Reading | Fault, at: float, others: Others) -> None:
    release.feed(Read("GPU-1", at, at, reading), others)


def serving(baseline: Reading | None = EMPTY, seen: Reading = BUSY, own: frozenset[int] = frozenset({OWN})) -> Release:
    """Give a release whose server runs and was seen to hold memory."""
    release = Release(baseline)
    release.own |= own
    feed(release, seen, 1.0, Others())
    return release


def ended(release: Release, *readings: Reading | Fault, at: float = 10.0) -> Release:
    """Ask the server at 9 s; nothing of it is left at 10 s; then these readings come, one a second."""
    release.asked(9.0)
    release.gone(10.0)
    for number, reading in enumerate(readings):
        feed(release, reading, at + number, Others())
    return release


def test_nothing_is_said_while_the_server_runs() -> None:
    release = serving()
    assert not release.is_waited_for
    assert release.verdict(1e6, LIMIT_S) is None
    assert release.peak_bytes == 10 * GIB
    assert not release.is_back_early


def test_memory_that_is_back_is_free_from_the_first_reading_that_shows_it() -> None:
    release = ended(serving(), BUSY, EMPTY, EMPTY)
    assert release.verdict(12.0, LIMIT_S) == "freed"
    assert release.freed_at == 11.0
    assert release.waited_s(11.0) == 2.0
    assert release.is_judged


def test_a_reading_that_the_driver_keeps_counts_from_its_end() -> None:
    release = serving()
    release.asked(9.0)
    release.feed(Read("GPU-1", 8.9, 10.5, EMPTY), Others())
    assert release.freed_at is None
    release.feed(Read("GPU-1", 9.1, 10.6, EMPTY), Others())
    assert release.freed_at == 10.6


def test_a_reading_from_before_the_end_frees_nothing() -> None:
    release = serving()
    release.asked(9.0)
    feed(release, EMPTY, 8.9, Others())
    assert release.freed_at is None
    feed(release, EMPTY, 9.5, Others())
    assert release.freed_at == 9.5
    release.gone(10.0)
    assert release.verdict(10.0, LIMIT_S) is None, "it may have taken memory again in its last moment"
    feed(release, EMPTY, 10.0, Others())
    assert release.verdict(10.0, LIMIT_S) == "freed"
    assert release.freed_at == 9.5


def test_memory_that_comes_back_to_the_server_is_not_free() -> None:
    release = serving()
    release.asked(9.0)
    feed(release, EMPTY, 9.1, Others())
    assert release.is_back_early
    feed(release, BUSY, 9.2, Others())
    assert not release.is_back_early
    ended(release, EMPTY)
    assert release.freed_at == 10.0


def test_a_server_that_was_never_seen_on_the_device_hands_nothing_over_early() -> None:
    release = Release(EMPTY)
    release.asked(9.0)
    feed(release, EMPTY, 9.1, Others())
    assert release.freed_at == 9.1
    assert not release.is_back_early, "it may be about to take memory"


@pytest.mark.parametrize("reading", [BUSY, UNLISTED])
def test_memory_that_is_held_is_waited_for_to_the_limit(reading: Reading) -> None:
    release = ended(serving(), reading)
    assert release.verdict(10.0 + LIMIT_S - 0.1, LIMIT_S) is None
    assert release.verdict(10.0 + LIMIT_S, LIMIT_S) == "held"
    assert release.freed_at is None


@pytest.mark.parametrize(("reading", "patience_s"), [(HANGS, ANSWER_S), (LOST, 0.0)])
def test_a_device_that_cannot_be_read_is_unknown_and_not_waited_for(reading: Fault, patience_s: float) -> None:
    release = ended(serving(), reading)
    assert (release.verdict(9.9 + patience_s, LIMIT_S) is None) == (patience_s > 0)
    assert release.verdict(10.0 + patience_s, LIMIT_S) == "unknown"
    assert release.note == reading.text
    assert not release.is_judged


def test_a_driver_that_hangs_is_unknown_and_not_waited_for() -> None:
    release = ended(serving())
    assert release.verdict(10.0 + ANSWER_S - 0.1, LIMIT_S) is None
    assert release.verdict(10.0 + ANSWER_S, LIMIT_S) == "unknown"
    assert "NVML has not answered for 5 s" in release.note


def test_a_fault_that_passes_is_no_verdict() -> None:
    assert ended(serving(), HANGS, EMPTY).verdict(11.0, LIMIT_S) == "freed"


def test_what_cannot_be_told_is_unknown_after_a_moment() -> None:
    release = serving(own=frozenset())
    release.asked(9.0)
    release.gone(10.0)
    feed(release, TOTALS, 10.0, Others(frozenset(), are_there=True))
    assert release.verdict(10.0 + UNTELLABLE_S - 0.1, LIMIT_S) is None
    assert release.verdict(10.0 + UNTELLABLE_S, LIMIT_S) == "unknown"
    assert release.is_judged


def test_a_baseline_that_the_store_has_lost_is_unknown() -> None:
    release = ended(serving(baseline=None), EMPTY)
    assert release.verdict(10.0 + UNTELLABLE_S, LIMIT_S) == "unknown"
    assert "baseline" in release.note


def test_the_own_pids_are_trusted_only_if_one_was_seen() -> None:
    blind = Reading(10 * GIB, 80 * GIB, 2, {STRANGER: 10 * GIB})
    release = ended(serving(seen=blind, own=frozenset()), blind)
    assert release.verdict(10.0 + LIMIT_S, LIMIT_S) != "freed", (
        "its pids are of another namespace: it may be the stranger"
    )
    seen = ended(serving(), blind)
    assert seen.verdict(10.0, LIMIT_S) == "freed"
    assert seen.judgement.foreign == (STRANGER,)


def test_who_took_no_memory_needs_no_pid() -> None:
    assert ended(serving(seen=EMPTY, own=frozenset()), EMPTY).verdict(10.0, LIMIT_S) == "freed"


def test_a_neighbours_memory_is_not_the_servers() -> None:
    shared = Reading(5 * GIB, 80 * GIB, 2, {STRANGER: 5 * GIB})
    release = serving()
    release.asked(9.0)
    release.gone(10.0)
    feed(release, shared, 10.0, Others(frozenset({STRANGER}), are_there=True))
    assert release.verdict(10.0, LIMIT_S) == "freed"
    assert release.judgement.foreign == ()


def test_the_pause_grows_with_the_wait() -> None:
    pauses = [pause_s(waited_s) for waited_s in (0.0, 1.0, 10.0, 20.0, 100.0, 1e6)]
    assert pauses == sorted(pauses)
    assert pauses[0] == 0.001
    assert pause_s(19.0) < 0.01
    assert pauses[-1] == LONGEST_PAUSE_S


def test_a_server_is_looked_at_often_at_first() -> None:
    """A process of it that nobody has seen on its device would be taken for a stranger."""
    assert sample_s(0.0) == 0.005
    assert sample_s(10.0) == 0.1
    assert sample_s(1000.0) == 0.25


def test_a_listed_process_that_has_ended_is_no_stranger() -> None:
    """It may have been the server's, and too short for anybody to see it on the device while it lived."""
    late = Reading(10 * GIB, 80 * GIB, 2, {STRANGER: 10 * GIB})
    release = serving()
    release.asked(9.0)
    release.gone(10.0)
    feed(release, late, 10.0, Others(gone=frozenset({STRANGER})))
    assert release.verdict(10.0 + LIMIT_S, LIMIT_S) == "held"
    assert not release.judgement.foreign
    assert release.judgement.excess_bytes == 10 * GIB
    feed(release, late, 11.0, Others())
    assert release.verdict(11.0, LIMIT_S) == "freed"
    assert release.judgement.foreign == (STRANGER,)
