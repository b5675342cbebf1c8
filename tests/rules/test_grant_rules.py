"""The rules on leases one by one: their instants of loss, and that no reading of the wrong moment is a baseline."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rules.books import (
    BROKER,
    CONTAINER,
    EMPTY,
    GIB,
    NOW,
    OTHER,
    TOTAL_MIB,
    asked,
    check_invariants,
    fresh,
    granted,
    held,
    served,
    used,
    waiting,
)

from harness.broker.book import Baseline, Book
from harness.broker.grants import (
    Granted,
    Refused,
    Waits,
    end,
    enqueue,
    grant,
    lease_of,
    lift,
    note_pids,
    pids_of,
    quarantine,
    remove_tenant,
    set_leaving,
    waiter_of,
    withdraw,
)
from harness.broker.readings import Fault, Reading

LOST = Fault("lost", "GPU is lost")
UNREADABLE = Fault("unknown", "NVML has not answered for 0.1 s")


# ---- the queue


def test_tickets_are_given_in_order_and_never_again() -> None:
    book = waiting(waiting(Book(), "a", 1, "A"), "b", 1, "A")
    book = waiting(withdraw(book, "a"), "c", 1, "A")
    assert [(waiter.id, waiter.ticket) for waiter in book.waiters] == [("b", 2), ("c", 3)]


def test_who_waits_or_has_its_lease_is_not_put_into_the_queue_again() -> None:
    """A broker that does not know whether its change was made makes it again."""
    book = waiting(Book(), "a", 1, "A")
    waiter = waiter_of(book, "a")
    assert waiter is not None
    assert enqueue(book, waiter) == book
    book = granted(book, "a", A=EMPTY)
    assert enqueue(book, waiter) == book
    assert asked(book, "a", A=EMPTY, B=EMPTY) == (book, Granted(("A",)))


def test_a_lease_has_what_its_waiter_said() -> None:
    book = waiting(Book(), "a", 1, "A", 1024, broker=OTHER)
    book, answer = grant(book, "a", fresh(book, A=EMPTY), 17.0, user=1000)
    assert answer == Granted(("A",))
    (lease,) = book.leases
    assert (lease.name, lease.test, lease.user, lease.since, lease.broker) == ("a", "test_a", 1000, 17.0, OTHER)
    assert (lease.devices, lease.tenants, lease.leaving, lease.stale_since) == ({"A": 1024}, (), (), None)


def test_what_an_earlier_one_does_not_want_is_free_to_have() -> None:
    book = waiting(held(Book(), "a", "A"), "b", 1, "AB")
    book = waiting(book, "c", 1, "BC")
    assert asked(book, "c", B=EMPTY, C=EMPTY)[1] == Granted(("C",))
    book = waiting(withdraw(book, "c"), "d", 2, "BC")
    assert asked(book, "d", B=EMPTY, C=EMPTY)[1] == Waits()


def test_what_an_earlier_one_can_never_use_is_not_kept_for_it() -> None:
    small = used(0, total_mib=40 * 1024)
    book = waiting(held(Book(), "a", "A"), "large", 1, "AB", 60 * 1024)
    book = waiting(book, "late", 1, "AB")
    assert asked(book, "late", A=EMPTY, B=small)[1] == Granted(("B",))
    assert asked(book, "late", A=EMPTY, B=EMPTY)[1] == Waits()
    assert asked(book, "late", A=EMPTY)[1] == Waits(), "without a reading nobody knows"


def test_a_withdrawn_waiter_holds_up_nobody() -> None:
    book = waiting(waiting(Book(), "a", 1, "A"), "b", 1, "A")
    assert asked(book, "b", A=EMPTY)[1] == Waits()
    assert asked(withdraw(book, "a"), "b", A=EMPTY)[1] == Granted(("A",))


# ---- which devices


def test_the_emptiest_comes_first_then_the_preferred() -> None:
    book = waiting(Book(), "a", 2, "ABCD")
    assert asked(book, "a", A=used(500), B=used(3), C=used(2), D=used(3))[1] == Granted(("C", "B"))


def test_a_device_that_is_held_whole_is_not_shared_nor_one_that_is_shared_held_whole() -> None:
    book = held(held(Book(), "a", "A"), "s", "B", 1)
    book = waiting(waiting(book, "whole", 1, "B"), "share", 1, "A", 1)
    for name in ("whole", "share"):
        assert asked(book, name)[1] == Waits(), "no reading would change that"
        assert asked(book, name, A=EMPTY, B=EMPTY)[1] == Waits()


def test_shares_fit_within_what_the_baseline_leaves_to_the_last_mib() -> None:
    book = granted(waiting(Book(), "a", 1, "A", 1000), "a", A=used(500))
    room_mib = TOTAL_MIB - 500 - 1000
    assert asked(waiting(book, "b", 1, "A", room_mib), "b")[1] == Granted(("A",)), "the baseline is known"
    more = waiting(book, "b", 1, "A", room_mib + 1)
    assert asked(more, "b")[1] == Waits()
    assert asked(end(more, "a", ["A"]), "b", A=EMPTY)[1] == Granted(("A",))


def test_a_share_prefers_what_is_shared_already_and_there_the_best_fit() -> None:
    book = held(held(held(Book(), "a", "A", 10_000), "b", "B", 40_000), "c", "C", 30_000)
    book = waiting(book, "s", 1, "DACB", 20_000)
    book, answer = asked(book, "s", D=EMPTY)
    assert answer == Granted(("B",))
    book = waiting(book, "t", 1, "DACB", 60_000)
    assert asked(book, "t", D=EMPTY)[1] == Granted(("A",)), "it does not fit on the others"
    book = waiting(withdraw(book, "t"), "u", 4, "DACB", 5_000)
    assert asked(book, "u", D=EMPTY)[1] == Granted(("B", "C", "A", "D"))


# ---- baselines


def test_each_device_is_granted_on_a_fresh_reading_which_is_its_baseline() -> None:
    book = waiting(Book(), "a", 2, "AB")
    assert asked(book, "a")[1] == Waits(("A", "B"))
    assert asked(book, "a", A=EMPTY)[1] == Waits(("B",))
    book = granted(book, "a", A=EMPTY, B=used(700))
    assert book.baselines == {"A": Baseline(EMPTY, NOW), "B": Baseline(used(700), NOW)}
    assert (book.generation("A"), book.generation("B"), book.generation("C")) == (1, 1, 0)


def test_a_reading_that_was_begun_while_another_had_the_device_is_none() -> None:
    """It may show that one's memory: what leaks afterwards would not be seen, up to as much."""
    book = waiting(held(Book(), "a", "A"), "b", 1, "A")
    while_held = fresh(book, A=used(70_000))
    book = end(book, "a", ["A"])
    assert grant(book, "b", while_held, NOW)[1] == Waits(("A",))


def test_a_reading_from_before_another_came_and_went_is_none() -> None:
    before = fresh(Book(), A=EMPTY)
    book = waiting(end(held(Book(), "a", "A"), "a", ["A"]), "b", 1, "A")
    assert grant(book, "b", before, NOW)[1] == Waits(("A",))


def test_a_share_beside_others_keeps_their_baseline_until_the_last_one_leaves() -> None:
    book = granted(waiting(Book(), "a", 1, "A", 1000), "a", A=used(100))
    book = end(granted(waiting(book, "b", 1, "A", 1000), "b", A=used(1100)), "a", ["A"])
    assert book.baselines["A"].reading == used(100)
    assert end(book, "b", ["A"]).baselines == {}


def test_a_device_that_cannot_be_read_holds_up_no_other() -> None:
    book = waiting(Book(), "a", 1, "AB")
    assert asked(book, "a", A=UNREADABLE, B=EMPTY)[1] == Granted(("B",))
    assert asked(book, "a", A=LOST, B=EMPTY)[1] == Granted(("B",))


# ---- what can never be granted


def test_a_refusal_names_each_device_and_why() -> None:
    book = quarantine(held(Book(), "q", "A"), "q", "A", "it leaks", NOW)
    book = waiting(book, "a", 3, "ABC", 60_000)
    answer = asked(book, "a", A=used(1), B=LOST, C=used(30_000, {}))[1]
    assert answer == Refused(
        "3 GPUs are wanted, and 0 can be had: A is quarantined: it leaks; B is lost: GPU is lost;"
        f" C has at most {TOTAL_MIB - 30_000} MiB to give, and 60000 are wanted"
    )


def test_a_quarantined_device_is_read_before_anybody_is_refused() -> None:
    """Its memory may be back by now, and then the quarantine ends."""
    book = waiting(quarantine(held(Book(), "q", "A"), "q", "A", "it leaks", NOW), "a", 1, "A")
    stale = {"A": (book.generation("A") - 1, used(9000))}
    assert grant(book, "a", stale, NOW)[1] == Waits(("A",))
    assert isinstance(asked(book, "a", A=used(9000))[1], Refused)
    assert asked(waiting(book, "b", 1, "AB"), "b", B=EMPTY)[1] == Granted(("B",)), "others do not wait for it"


def test_a_lost_device_is_read_again_once_somebody_had_it() -> None:
    before = fresh(Book(), A=LOST)
    book = waiting(end(held(Book(), "b", "A"), "b", ["A"]), "a", 1, "A")
    assert grant(book, "a", before, NOW)[1] == Waits(("A",))


def test_a_share_is_not_refused_for_memory_that_comes_back() -> None:
    """Whether it was a lease's, which is over since the reading, or is a stranger's, who may leave."""
    book = waiting(held(Book(), "a", "A"), "s", 1, "A", 40_000)
    while_held = fresh(book, A=used(70_000))
    book = end(book, "a", ["A"])
    assert grant(book, "s", while_held, NOW)[1] == Waits(("A",))
    assert asked(book, "s", A=used(70_000))[1] == Waits()
    beside = granted(waiting(Book(), "b", 1, "A", 5), "b", A=used(70_000))
    assert asked(waiting(beside, "s", 1, "A", 40_000), "s")[1] == Waits()
    assert asked(waiting(Book(), "t", 1, "AB", 40_000), "t", A=used(70_000), B=used(9_000))[1] == Granted(("B",))


@pytest.mark.parametrize("processes", [{}, None, {1: None}])
def test_a_share_is_refused_for_memory_that_is_not_known_to_be_a_process(
    processes: dict[int, int | None] | None,
) -> None:
    reading = Reading(20 * GIB, 80 * GIB, 2, processes)
    assert isinstance(asked(waiting(Book(), "s", 1, "A", 60 * 1024 + 1), "s", A=reading)[1], Refused)
    assert asked(waiting(Book(), "s", 1, "A", 60 * 1024), "s", A=reading)[1] == Granted(("A",))


def test_a_share_that_no_device_has_is_refused_while_others_hold_them() -> None:
    book = held(Book(), "a", "A")
    assert isinstance(asked(waiting(book, "s", 1, "A", TOTAL_MIB + 1), "s")[1], Refused)
    assert asked(waiting(book, "s", 1, "A", TOTAL_MIB), "s")[1] == Waits()


# ---- devices that are being left


def leaving(*, share: int | None = None, baseline: Reading = EMPTY) -> Book:
    """Give a book in which the memory of process 100 is back, though its tree is still ending."""
    book = granted(waiting(Book(), "old", 1, "A", share), "old", A=baseline)
    return set_leaving(served(book, "old", 100), "old", "A")


def test_a_device_that_is_being_left_is_given_on_and_keeps_its_baseline() -> None:
    book = waiting(leaving(baseline=used(300)), "new", 1, "A")
    assert asked(book, "new")[1] == Waits(("A",)), "a reading from before proves nothing"
    book = granted(book, "new", A=used(310))
    assert book.baselines["A"].reading == used(300)
    assert [lease.id for lease in book.holders_of("A")] == ["new"]
    book = end(book, "old", ["A"])
    assert book.baselines["A"].reading == used(300)
    assert lease_of(book, "old") is None


@pytest.mark.parametrize(
    "reading",
    [
        used(0, {100: 0}),
        used(0, {100: None}),
        used(500, {}),
        Reading(500 << 20, 80 * GIB, 2, None),
        Reading(0, 80 * GIB, 1, {}),
        UNREADABLE,
    ],
    ids=["listed", "listed, untold", "held by no process", "no list", "read in another way", "fault"],
)
def test_a_device_is_not_given_on_while_the_old_tenant_or_its_memory_may_be_there_again(
    reading: Reading | Fault,
) -> None:
    book = waiting(leaving(), "new", 1, "A")
    assert asked(book, "new", A=reading) == (book, Waits())


@pytest.mark.parametrize("reading", [EMPTY, used(64, {}), used(5000)], ids=["empty", "slack", "a stranger's"])
def test_a_device_is_given_on_whatever_is_not_the_old_tenants(reading: Reading) -> None:
    assert asked(waiting(leaving(), "new", 1, "A"), "new", A=reading)[1] == Granted(("A",))


def test_a_server_that_was_never_listed_is_judged_by_totals() -> None:
    book = waiting(set_leaving(held(Book(), "old", "A"), "old", "A"), "new", 1, "A")
    assert asked(book, "new", A=used(500))[1] == Waits(), "the stranger may be the server"
    assert asked(book, "new", A=EMPTY)[1] == Granted(("A",))


def test_pids_of_another_namespace_do_not_prove_that_a_tenant_has_left() -> None:
    book = served(held(Book(), "old", "A", broker=CONTAINER), "old", 100)
    book = waiting(set_leaving(book, "old", "A"), "new", 1, "A")
    here_it_is_another_number = used(500, {4711: 500 << 20})
    assert asked(book, "new", A=here_it_is_another_number)[1] == Waits()
    assert asked(end(book, "old", ["A"]), "new", A=EMPTY)[1] == Granted(("A",))


def test_a_share_beside_one_that_is_being_left() -> None:
    book = held(leaving(share=TOTAL_MIB - 1000), "stays", "A", 1000)
    book = waiting(book, "new", 1, "A", TOTAL_MIB - 2000)
    assert asked(book, "new")[1] == Waits(("A",)), "the pids have to be looked at"
    assert asked(book, "new", A=used(900, {100: 900 << 20}))[1] == Waits()
    book = granted(book, "new", A=used(900))
    check_invariants(book)
    assert asked(waiting(book, "more", 1, "A", 1001), "more", A=EMPTY)[1] == Waits()


def test_two_that_leave_must_both_have_left() -> None:
    book = served(served(held(held(Book(), "one", "A", 5), "two", "A", 5), "one", 100), "two", 200)
    book = waiting(set_leaving(set_leaving(book, "one", "A"), "two", "A"), "new", 1, "A")
    for pid in (100, 200):
        assert asked(book, "new", A=used(0, {pid: 0}))[1] == Waits()
    assert asked(book, "new", A=EMPTY)[1] == Granted(("A",))


def test_a_group_is_left_device_by_device() -> None:
    book = set_leaving(held(Book(), "old", "AB"), "old", "B")
    book = granted(waiting(book, "new", 1, "AB"), "new", A=EMPTY, B=EMPTY)
    assert [lease.id for lease in book.holders_of("B")] == ["new"]
    book = end(book, "old", ["B"])
    old = lease_of(book, "old")
    assert old is not None
    assert (list(old.devices), old.leaving) == (["A"], ())


def test_what_is_not_had_is_not_left() -> None:
    book = held(Book(), "a", "A")
    assert set_leaving(book, "a", "B") == book


@pytest.mark.parametrize("is_leaving", [True, False])
def test_without_its_baseline_a_leased_device_is_not_given_on(*, is_leaving: bool) -> None:
    book = held(Book(), "a", "A", 5)
    book = replace(set_leaving(book, "a", "A") if is_leaving else book, baselines={})
    assert asked(waiting(book, "b", 1, "A", 5), "b", A=EMPTY)[1] == Waits()
    assert asked(waiting(end(book, "a", ["A"]), "b", 1, "A", 5), "b", A=EMPTY)[1] == Granted(("A",))


# ---- leases


def test_tenants_come_and_go_and_their_pids_are_kept() -> None:
    book = served(served(held(held(Book(), "a", "A"), "b", "B"), "a", 100), "a", 101)
    other = lease_of(book, "b")
    book = note_pids(book, "a", 101, ((101, 3000), (102, 3001)))
    lease = lease_of(book, "a")
    assert lease is not None
    assert [tenant.pids for tenant in lease.tenants] == [((100, 3000),), ((101, 3000), (102, 3001))]
    assert pids_of(lease) == {100, 101, 102}
    gone = lease_of(remove_tenant(book, "a", 100), "a")
    assert gone is not None
    assert pids_of(gone) == {101, 102}
    assert lease_of(book, "b") == other


def test_a_lease_gives_its_devices_back_one_by_one_and_ends_with_the_last() -> None:
    book = held(Book(), "a", "ABC")
    before = book.generations
    book = end(book, "a", ["B", "no such device"])
    assert [list(lease.devices) for lease in book.leases] == [["A", "C"]]
    assert book.baselines.keys() == {"A", "C"}
    assert book.generations == {**before, "B": before["B"] + 1}
    book = end(book, "a", ["A", "C"])
    assert (book.leases, book.baselines) == ((), {})


def test_what_is_ended_twice_is_ended_once() -> None:
    """The second end must not take the device from who has it by now."""
    book = end(held(Book(), "a", "A"), "a", ["A"])
    assert end(book, "a", ["A"]) == book
    book = held(book, "b", "A")
    assert end(book, "a", ["A"]) == book
    assert end(book, "b", []) == book


# ---- quarantines


def test_a_quarantined_device_leaves_its_lease_and_keeps_its_baseline_and_pids() -> None:
    book = served(served(held(Book(), "a", "AB"), "a", 101), "a", 100)
    book = quarantine(book, "a", "A", "it leaks", 9.0)
    entry = book.quarantines["A"]
    assert (entry.reason, entry.since, entry.lease) == ("it leaks", 9.0, "a")
    assert (entry.pids, entry.namespace) == (((100, 3000), (101, 3000)), BROKER.namespace)
    assert [list(lease.devices) for lease in book.leases] == [["B"]]
    assert quarantine(book, "a", "A", "again", 10.0) == book
    check_invariants(quarantine(book, "a", "B", "so does it", 9.0))


def test_a_second_quarantine_does_not_forget_whom_the_first_waits_for() -> None:
    book = served(served(held(held(Book(), "a", "A", 5), "b", "A", 5), "a", 100), "b", 200)
    book = quarantine(quarantine(book, "a", "A", "a leaks", 1.0), "b", "A", "b leaks", 2.0)
    entry = book.quarantines["A"]
    assert (entry.reason, entry.since, entry.lease) == ("a leaks; b leaks", 1.0, "a")
    assert entry.pids == ((100, 3000), (200, 3000))


def test_pids_of_two_namespaces_are_not_put_together() -> None:
    book = held(held(Book(), "a", "A", 5), "b", "A", 5, broker=CONTAINER)
    book = served(served(book, "a", 100), "b", 100)
    book = quarantine(quarantine(book, "a", "A", "a leaks", 1.0), "b", "A", "b leaks", 2.0)
    assert book.quarantines["A"].pids == ()


def test_a_lifted_device_is_granted_on_a_new_baseline() -> None:
    book = quarantine(held(Book(), "a", "A"), "a", "A", "it leaks", NOW)
    in_quarantine = fresh(book, A=used(9000))
    book = lift(book, "A")
    assert (book.quarantines, book.baselines) == ({}, {})
    assert lift(book, "A") == book
    book = waiting(book, "b", 1, "A")
    assert grant(book, "b", in_quarantine, NOW)[1] == Waits(("A",))
    assert granted(book, "b", A=used(9000)).baselines["A"].reading == used(9000)


def test_a_lifted_device_that_others_share_keeps_their_baseline() -> None:
    book = held(held(Book(), "a", "A", 5), "b", "A", 5)
    book = waiting(quarantine(book, "a", "A", "it leaks", NOW), "c", 1, "A", 5)
    assert isinstance(asked(book, "c", A=EMPTY)[1], Refused)
    book = lift(book, "A")
    assert book.baselines["A"].reading == EMPTY
    assert asked(book, "c")[1] == Granted(("A",))
