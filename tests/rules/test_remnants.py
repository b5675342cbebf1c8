"""What the dead have left in the book: it ends when the memory is back, and nobody else is touched."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from rules.books import BROKER, CONTAINER, EMPTY, NOW, OTHER, check_invariants, fresh, held, served, used, waiting

from harness.broker.book import Book, Who
from harness.broker.grants import Granted, grant, lease_of, quarantine, set_leaving
from harness.broker.readings import Fault
from harness.broker.remnants import prune

if TYPE_CHECKING:
    from harness.broker.grants import Readings

KEEPER = Who(20, 2000, 7)
LIMIT_S = 60.0


def pruned(book: Book, readings: Readings, now: float = NOW, *alive: Who) -> tuple[Book, tuple[str, ...]]:
    """Prune where only these are alive; of another PID namespace nobody knows."""

    def is_alive(who: Who) -> bool | None:
        return None if who.namespace == CONTAINER.namespace else who in alive

    return prune(book, is_alive, readings, now, LIMIT_S)


def stale(book: Book) -> Book:
    """Let it be found that everybody is dead."""
    book, lines = pruned(book, {})
    assert lines == ()
    return book


def test_whose_broker_has_died_is_not_granted_anything() -> None:
    book = waiting(waiting(Book(), "dead", 1, "A"), "b", 1, "A", broker=OTHER)
    readings = fresh(book, A=EMPTY)
    book, _ = pruned(book, readings, NOW, OTHER)
    assert grant(book, "b", readings, NOW)[1] == Granted(("A",))


def test_of_another_namespace_nobody_is_known_to_be_dead() -> None:
    book = waiting(held(Book(), "a", "A", broker=CONTAINER), "w", 1, "A", broker=CONTAINER)
    assert pruned(book, fresh(book, A=EMPTY), NOW + 1e6) == (book, ())


def test_a_process_that_has_another_start_time_is_another() -> None:
    book, _ = pruned(held(Book(), "a", "A"), {}, NOW, replace(BROKER, start_time=1))
    assert book.leases[0].stale_since == NOW


def test_a_reading_from_before_it_was_found_that_they_are_dead_proves_nothing() -> None:
    """They may have allocated since."""
    book = served(held(Book(), "a", "A"), "a", 100)
    before = fresh(book, A=EMPTY)
    book, lines = pruned(book, before)
    assert lines == ()
    assert pruned(book, before, NOW + 1) == (book, ())
    book, lines = pruned(book, fresh(book, A=EMPTY), NOW + 1)
    assert lines == ("A is back from 'a' of test_a, whose processes are dead",)
    assert (book.leases, book.baselines, book.quarantines) == ((), {}, {})


@pytest.mark.parametrize(("later_s", "is_quarantined"), [(LIMIT_S - 0.001, False), (LIMIT_S, True)])
def test_memory_that_does_not_come_back_is_waited_for_then_quarantined(later_s: float, *, is_quarantined: bool) -> None:
    book = stale(served(held(Book(), "a", "AB"), "a", 100, devices="AB"))
    book, lines = pruned(book, fresh(book, A=used(3000, {100: 3000 << 20}), B=EMPTY), NOW + later_s)
    assert lines[-1] == "B is back from 'a' of test_a, whose processes are dead"
    assert (book.quarantines.keys() == {"A"}) is is_quarantined
    if is_quarantined:
        reason = "3000 MiB did not come back from 'a' of test_a, whose processes are dead"
        assert lines[0] == f"A is quarantined: {reason}"
        assert (book.quarantines["A"].reason, book.quarantines["A"].since) == (reason, NOW + later_s)
        assert book.leases == ()
    else:
        assert [(list(lease.devices), lease.stale_since) for lease in book.leases] == [(["A"], NOW)]
    check_invariants(book)


def test_what_nobody_has_read_is_not_said_to_be_held() -> None:
    """A run that crashed, and nobody wanted its device for an hour: it is read before it is judged."""
    book = stale(held(Book(), "a", "A"))
    assert pruned(book, {}, NOW + 3600) == (book, ())
    assert pruned(book, fresh(book, A=EMPTY), NOW + 3600)[0].leases == ()


def test_what_cannot_be_told_is_waited_for_then_quarantined_and_says_why() -> None:
    book = stale(held(Book(), "a", "A"))
    fault = Fault("unknown", "NVML has not answered for 0.1 s")
    assert pruned(book, fresh(book, A=fault), NOW + 1) == (book, ())
    book, _ = pruned(book, fresh(book, A=fault), NOW + LIMIT_S)
    assert book.quarantines["A"].reason == (
        "its memory cannot be told since 'a' of test_a, whose processes are dead: NVML has not answered for 0.1 s"
    )


def test_without_a_baseline_nothing_can_be_told() -> None:
    book = replace(stale(held(Book(), "a", "A")), baselines={})
    assert pruned(book, fresh(book, A=EMPTY), NOW + 1) == (book, ())
    book, _ = pruned(book, fresh(book, A=EMPTY), NOW + LIMIT_S)
    assert book.quarantines["A"].reason.endswith("its baseline has been lost from the store")
    assert pruned(book, fresh(book, A=EMPTY)) == (book, ())


def test_a_process_that_outlived_its_keeper_holds_the_device() -> None:
    book = stale(served(held(Book(), "a", "A"), "a", 100))
    assert pruned(book, fresh(book, A=used(0, {100: 0})), NOW + 1) == (book, ())


def test_a_survivor_of_a_server_that_was_never_listed_is_not_taken_for_a_stranger() -> None:
    book = stale(held(Book(), "a", "A"))
    assert pruned(book, fresh(book, A=used(3000, {4711: 3000 << 20})), NOW + 1) == (book, ())


def test_neighbours_of_the_dead_keep_what_they_have() -> None:
    book = served(held(Book(), "a", "A", 5000), "a", 100)
    book = served(held(book, "b", "A", 5000, broker=OTHER), "b", 200, keeper=21)
    book, _ = pruned(book, {}, NOW, OTHER)
    assert [lease.stale_since for lease in book.leases] == [NOW, None]
    book, lines = pruned(book, fresh(book, A=used(5000, {200: 5000 << 20})), NOW + 1, OTHER)
    assert len(lines) == 1
    assert [lease.id for lease in book.leases] == ["b"]
    assert book.baselines["A"].reading == EMPTY


def test_what_two_have_left_on_one_device_ends_one_after_another() -> None:
    book = stale(served(served(held(held(Book(), "a", "A", 5), "b", "A", 5), "a", 100), "b", 200))
    for left in (1, 0):  # the device has changed hands since the first reading
        book, lines = pruned(book, fresh(book, A=EMPTY), NOW + 1)
        assert (len(lines), len(book.leases)) == (1, left)


def test_a_device_that_the_dead_were_leaving_ends_beside_who_has_it_now() -> None:
    book = set_leaving(served(held(Book(), "a", "A"), "a", 100), "a", "A")
    book = served(held(book, "b", "A", broker=OTHER), "b", 200, keeper=21)
    book, _ = pruned(book, {}, NOW, OTHER)
    book, _ = pruned(book, fresh(book, A=used(5000, {200: 5000 << 20})), NOW + 1, OTHER)
    assert [lease.id for lease in book.leases] == ["b"]
    check_invariants(book)


# ---- quarantines


def quarantined(broker: Who = BROKER) -> Book:
    book = served(held(Book(), "a", "A", broker=broker), "a", 100)
    return quarantine(book, "a", "A", "it leaks", NOW)


def test_a_quarantine_ends_when_the_memory_is_back_and_not_before() -> None:
    book = quarantined()
    unchanged: list[Readings] = [
        {},
        {"A": (book.generation("A") - 1, EMPTY)},
        fresh(book, A=used(9000, {100: 9000 << 20})),
        fresh(book, A=used(9000, {})),
    ]
    for readings in unchanged:
        assert pruned(book, readings) == (book, ())
    book, lines = pruned(book, fresh(book, A=EMPTY))
    assert lines == ("A is in quarantine no more: its memory is back",)
    assert (book.quarantines, book.baselines) == ({}, {})


def test_a_stranger_does_not_keep_a_device_in_quarantine() -> None:
    book = quarantined()
    assert pruned(book, fresh(book, A=used(9000)))[0].quarantines == {}


def test_a_device_stays_in_quarantine_until_each_who_leaked_is_gone() -> None:
    book = served(served(held(held(Book(), "a", "A", 5), "b", "A", 5), "a", 100), "b", 200)
    book = quarantine(quarantine(book, "a", "A", "x", NOW), "b", "A", "y", NOW)
    for pid in (100, 200):
        assert pruned(book, fresh(book, A=used(300, {pid: 300 << 20}))) == (book, ())
    assert pruned(book, fresh(book, A=EMPTY))[0].quarantines == {}


def test_a_quarantine_of_another_namespace_ends_by_totals() -> None:
    """The process that holds the memory is listed here, by a number that the quarantine does not know."""
    book = quarantined(CONTAINER)
    assert pruned(book, fresh(book, A=used(9000, {4711: 9000 << 20}))) == (book, ())
    assert pruned(book, fresh(book, A=EMPTY))[0].quarantines == {}


def test_a_quarantined_device_that_others_share_is_lifted_beside_them() -> None:
    book = served(held(held(Book(), "a", "A", 5), "b", "A", 5, broker=OTHER), "a", 100)
    book = quarantine(book, "a", "A", "x", NOW)
    book, lines = pruned(book, fresh(book, A=used(5, {200: 5 << 20})), NOW, OTHER)
    assert len(lines) == 1
    assert lease_of(book, "b") is not None
    check_invariants(book)


def test_a_process_that_has_come_may_be_one_that_nobody_has_noted() -> None:
    """The broker died first, so a worker that was started after it is in no list: its memory is not a stranger's."""
    book = stale(served(held(Book(), "a", "A"), "a", 100))
    worker = fresh(book, A=used(3000, {101: 3000 << 20}))
    assert pruned(book, worker, NOW + LIMIT_S - 1)[0] == book
    book, _ = pruned(book, worker, NOW + LIMIT_S)
    assert "processes have come that may be of its tree" in book.quarantines["A"].reason
    assert pruned(book, fresh(book, A=used(3000, {101: 3000 << 20})))[0] == book
    assert pruned(book, fresh(book, A=EMPTY))[0].quarantines == {}
