"""What somebody who waits is told: who has what, since when, and who came earlier."""

from __future__ import annotations

from rules.books import NOW, OTHER, held, served, waiting

from harness.broker.book import Book
from harness.broker.grants import quarantine, set_leaving
from harness.broker.remnants import prune
from harness.broker.words import describe_wait

LATER = NOW + 12.4


def test_each_holder_of_each_wanted_device_is_named_and_no_other() -> None:
    book = served(held(Book(), "rank0", "A"), "rank0", 100, keeper=123)
    book = held(held(held(book, "s", "B", 1000), "t", "B", 2000, broker=OTHER), "other", "C")
    assert describe_wait(waiting(book, "w", 2, "AB"), "w", LATER) == (
        "waiting for 2 of 2 GPUs: A is held by 'rank0' of test_rank0 (pid 123) for 12 s;"
        " B is held by 's' of test_s (pid 10) for 12 s, 1000 MiB of it;"
        " B is held by 't' of test_t (pid 11) for 12 s, 2000 MiB of it"
    )


def test_only_who_came_earlier_and_wants_the_same_is_told() -> None:
    book = waiting(waiting(waiting(Book(), "x", 1, "Z"), "first", 2, "AB"), "second", 1, "BC")
    book = waiting(waiting(book, "w", 1, "BC"), "late", 1, "BC")
    assert describe_wait(book, "w", LATER) == (
        "waiting for 1 of 2 GPUs: 2 came earlier, the first 'first' of test_first 12 s ago"
    )


def test_quarantines_and_the_dead_are_told() -> None:
    book = held(held(Book(), "q", "A"), "dead", "B")
    book, _ = prune(quarantine(book, "q", "A", "it leaks", NOW), lambda _who: False, {}, NOW, 60.0)
    assert describe_wait(waiting(book, "w", 2, "AB", 700), "w", LATER) == (
        "waiting for 2 of 2 GPUs with 700 MiB: A is quarantined: it leaks;"
        " B is held by 'dead' of test_dead (pid 10) for 12 s, whose processes are dead"
    )


def test_where_no_lease_is_in_the_way_it_is_said_what_may_be() -> None:
    book = waiting(set_leaving(held(Book(), "old", "A"), "old", "A"), "w", 1, "A")
    assert describe_wait(book, "w", LATER) == (
        "waiting for 1 of 1 GPUs: nobody has leased them, but NVML has not told that they are free,"
        " or others use too much of them"
    )
