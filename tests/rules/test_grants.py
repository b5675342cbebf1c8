"""Who gets which device, in which order, and how leases end, also those of the dead: change by change."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from harness.broker import grants, remnants, words
from harness.broker.book import Book, Tenant, Waiter, Want, Who, forget_other_boot
from harness.broker.readings import Fault, Reading

if TYPE_CHECKING:
    from collections.abc import Iterable

GIB = 1 << 30
EMPTY = Reading(0, 80 * GIB, 2, {})
BUSY = Reading(10 * GIB, 80 * GIB, 2, {100: 10 * GIB})
BROKER, KEEPER = Who(10, 1, 7), Who(20, 2, 7)
A, B, C = "GPU-a", "GPU-b", "GPU-c"


def waiter(name: str, count: int, *candidates: str, mib: int | None = None, broker: Who = BROKER) -> Waiter:
    return Waiter(0, name, name, f"test_{name}", broker, 5.0, Want(count, candidates, mib))


def queue(*waiters: Waiter, book: Book | None = None) -> Book:
    found = book or Book(boot="now")
    for one in waiters:
        found = grants.enqueue(found, one)
    return found


def fresh(book: Book, *uuids: str, reading: Reading | Fault = EMPTY) -> dict[str, tuple[int, Reading | Fault]]:
    return {uuid: (book.generation(uuid), reading) for uuid in uuids}


def granted(book: Book, name: str, *uuids: str, reading: Reading = EMPTY) -> Book:
    """Grant a waiter, whatever it needs being read now."""
    book, answer = grants.grant(book, name, fresh(book, *uuids, reading=reading), 9.0)
    assert isinstance(answer, grants.Granted), answer
    return book


def answer_of(book: Book, name: str, *uuids: str) -> grants.Answer:
    return grants.grant(book, name, fresh(book, *uuids), 9.0)[1]


def test_a_device_that_nobody_has_is_read_first_and_the_reading_is_its_baseline() -> None:
    book = queue(waiter("a", 1, A))
    assert answer_of(book, "a") == grants.Waits((A,))
    stale = {A: (book.generation(A) - 1, EMPTY)}
    assert grants.grant(book, "a", stale, 9.0)[1] == grants.Waits((A,))
    book = granted(book, "a", A)
    assert book.baselines[A].reading == EMPTY, "a baseline of exactly 0 is one"
    assert book.waiters == ()
    assert book.generation(A) == 1
    assert Book.from_json_dict(book.to_json_dict()).leases[0].devices == {A: None}


def test_all_or_nothing_in_arrival_order() -> None:
    book = granted(queue(waiter("first", 1, A)), "first", A)
    book = queue(waiter("large", 2, A, B), waiter("small", 1, A, B), waiter("elsewhere", 1, C), book=book)
    assert answer_of(book, "large", A, B, C) == grants.Waits()
    assert answer_of(book, "small", A, B, C) == grants.Waits(), "it would starve the large one"
    book = granted(book, "elsewhere", C)
    book = granted(grants.end(book, "first", [A]), "large", A, B)
    assert answer_of(book, "small", A, B) == grants.Waits()
    book = granted(grants.end(book, "large", [A, B]), "small", A, B)
    assert set(book.leases[-1].devices) == {A}


def test_who_only_watches_goes_ahead_of_others_when_its_process_watches_already() -> None:
    """The others wait for the first of its servers, which may wait for the second: ranks of one deployment."""
    other = Who(11, 1, 7)
    book = granted(queue(waiter("rank0", 1, A, mib=1)), "rank0", A)
    book = queue(waiter("whole", 2, A, B, broker=other), waiter("rank1", 2, A, B, mib=1), book=book)
    book = queue(waiter("stranger", 2, A, B, mib=1, broker=other), waiter("share", 1, B, mib=2), book=book)
    assert answer_of(book, "stranger", A, B) == grants.Waits()
    assert answer_of(book, "share", A, B) == grants.Waits()
    book = granted(book, "rank1", A, B)
    assert book.leases[-1].devices == {A: 1, B: 1}
    book = granted(grants.end(grants.end(book, "rank0", [A]), "rank1", [A, B]), "whole", A, B)
    assert answer_of(book, "stranger", A, B) == grants.Waits()


def test_shares_pack_one_device_and_no_more_than_it_has() -> None:
    book = queue(*(waiter(f"s{n}", 1, A, B, mib=40_000) for n in range(3)), waiter("w", 1, A, B))
    book = granted(granted(book, "s0", A, B), "s1", A, B)
    assert [set(lease.devices) for lease in book.leases] == [{A}, {A}]
    book = granted(book, "s2", A, B)
    assert set(book.leases[2].devices) == {B}
    assert answer_of(book, "w", A, B) == grants.Waits()
    book = granted(grants.end(book, "s2", [B]), "w", B)
    assert answer_of(queue(waiter("s3", 1, B, mib=1), book=book), "s3", B) == grants.Waits()
    refused = answer_of(queue(waiter("huge", 1, A, mib=90_000)), "huge", A)
    assert isinstance(refused, grants.Refused)
    assert "has at most 81920 MiB to give, and 90000 are wanted" in refused.text


def test_lost_and_quarantined_devices_are_given_to_nobody() -> None:
    book = queue(waiter("a", 1, A))
    lost = fresh(book, A, reading=Fault("lost", "GPU is lost"))
    assert grants.grant(book, "a", lost, 9.0)[1] == grants.Refused(
        f"1 GPUs are wanted, and 0 can be had: {A} is lost: GPU is lost"
    )
    unknown = fresh(book, A, reading=Fault("unknown", "slow"))
    assert grants.grant(book, "a", unknown, 9.0)[1] == grants.Waits()
    book = grants.quarantine(granted(book, "a", A), "a", A, "held", 9.0)
    assert book.leases == ()
    assert A in book.baselines
    book = queue(waiter("b", 1, A), book=book)
    assert answer_of(book, "b") == grants.Waits((A,)), "its memory may be back"
    assert isinstance(answer_of(book, "b", A), grants.Refused)
    assert grants.lift(book, A).baselines == {}


def test_a_device_that_is_being_left_is_given_on_if_nothing_came_back() -> None:
    book = granted(queue(waiter("old", 1, A), waiter("new", 1, A)), "old", A)
    book = grants.add_tenant(book, "old", Tenant(1, "old", KEEPER, (A,)))
    book = grants.note_pids(book, "old", 1, ((100, 1),))
    assert answer_of(book, "new", A) == grants.Waits()
    book = grants.set_leaving(book, "old", A)
    assert grants.set_leaving(book, "old", A) == book
    assert answer_of(book, "new") == grants.Waits((A,))
    assert grants.grant(book, "new", fresh(book, A, reading=BUSY), 9.0)[1] == grants.Waits()
    book = granted(book, "new", A)
    assert len(book.leases) == 2
    book = grants.end(grants.remove_tenant(book, "old", 1), "old", [A])
    assert A in book.baselines, "it is the new one's as well"


def test_what_is_not_there_changes_nothing() -> None:
    book = granted(queue(waiter("a", 1, A)), "a", A)
    assert grants.end(book, "b", [A]) == grants.end(book, "a", [B]) == grants.withdraw(book, "b") == book
    assert grants.quarantine(book, "a", B, "", 9.0) == grants.set_leaving(book, "b", A) == book
    assert grants.grant(book, "b", {}, 9.0)[1] == grants.Refused("it does not wait any more")
    assert grants.add_tenant(book, "b", Tenant(1, "b", KEEPER, (A,))) == book


def prune(book: Book, dead: Iterable[Who], now: float, reading: Reading | Fault | None = None) -> Book:
    readings = {} if reading is None else fresh(book, A, B, reading=reading)
    return remnants.prune(book, lambda who: who not in set(dead), readings, now, 60.0)[0]


def crashed() -> Book:
    book = granted(queue(waiter("a", 1, A)), "a", A)
    book = grants.add_tenant(book, "a", Tenant(1, "a", KEEPER, (A,)))
    return grants.note_pids(book, "a", 1, ((100, 1),))


def test_a_lease_lives_as_long_as_its_broker_or_a_keeper() -> None:
    for dead in ([], [BROKER], [KEEPER]):
        assert prune(crashed(), dead, 10.0, EMPTY) == crashed()


def test_a_stale_lease_ends_when_a_later_reading_shows_its_memory_back() -> None:
    stale = prune(crashed(), [BROKER, KEEPER], 10.0, EMPTY)
    assert stale.leases[0].stale_since == 10.0, "a reading of before proves nothing"
    assert prune(stale, [BROKER, KEEPER], 11.0, BUSY) == stale
    assert prune(stale, [BROKER, KEEPER], 11.0, EMPTY).leases == ()


@pytest.mark.parametrize("reading", [BUSY, Fault("unknown", "slow")])
def test_a_stale_lease_whose_memory_does_not_come_back_is_quarantined_until_it_does(
    reading: Reading | Fault,
) -> None:
    stale = prune(crashed(), [BROKER, KEEPER], 10.0)
    quarantined = prune(stale, [BROKER, KEEPER], 70.0, reading)
    assert quarantined.leases == ()
    assert quarantined.quarantines[A].pids == ((100, 1),)
    assert prune(quarantined, [], 80.0, BUSY).quarantines, "its own process is still listed"
    assert prune(quarantined, [], 80.0, EMPTY) == replace(Book(boot="now", next_ticket=2), generations={A: 4})


def test_waiters_that_are_dead_or_stopped_lose_their_place() -> None:
    book = queue(waiter("a", 1, A), waiter("b", 1, A, broker=KEEPER))
    assert [one.id for one in prune(book, [BROKER], 1.0).waiters] == ["b"]
    left, _ = remnants.prune(book, lambda _who: None, {}, 1.0, 60.0, is_stopped=lambda who: who == KEEPER)
    assert [one.id for one in left.waiters] == ["a"]


def test_another_boot_has_ended_everything() -> None:
    assert forget_other_boot(crashed(), "now") == crashed()
    assert forget_other_boot(crashed(), "later") == Book(boot="later")


def test_who_waits_is_told_who_has_what_since_when() -> None:
    book = queue(waiter("b", 1, A, mib=7), waiter("c", 1, A), book=crashed())
    text = words.describe_wait(book, "c", 29.0)
    assert text == (
        f"waiting for 1 of 1 GPUs: {A} is held by 'a' of test_a (pid 20) for 20 s;"
        " 1 came earlier, the first 'b' of test_b 24 s ago"
    )
    assert "with 7 MiB" in words.describe_wait(book, "b", 29.0)
    assert words.describe_wait(book, "x", 29.0) == "it does not wait any more"
    assert words.describe_wait(queue(waiter("d", 1, B)), "d", 6.0).startswith("waiting for 1 of 1 GPUs: nobody")
    held = grants.quarantine(crashed(), "a", A, "why", 9.0)
    assert f"{A} is quarantined: why" in words.describe_wait(queue(waiter("e", 1, A), book=held), "e", 9.0)


@pytest.mark.parametrize("seed", range(30))
def test_whatever_the_order_no_device_is_had_twice_and_everybody_has_a_turn(seed: int) -> None:
    dice = random.Random(seed)  # noqa: S311 - no secret
    book, waited, number = Book(boot="now"), 0, 0
    for _ in range(120):
        if len(book.waiters) < 6 and dice.random() < 0.5:
            number += 1
            candidates = dice.sample([A, B, C], dice.randint(1, 3))
            mib = dice.choice([None, 20_000, 50_000])
            book = queue(waiter(str(number), dice.randint(1, len(candidates)), *candidates, mib=mib), book=book)
        if book.leases and dice.random() < 0.4:
            lease = dice.choice(book.leases)
            book = grants.end(book, lease.id, list(lease.devices))
        for one in list(book.waiters):
            book, _ = grants.grant(book, one.id, fresh(book, A, B, C), 9.0)
        for uuid in (A, B, C):
            shares = [lease.devices[uuid] for lease in book.holders_of(uuid)]
            assert None not in shares or len(shares) == 1
            assert sum(share or 0 for share in shares) <= 81_920
            assert (uuid in book.baselines) == bool(shares)
        waited = waited + 1 if book.waiters and not book.leases else 0
        assert waited == 0, "devices are free, and nobody has them"
    while book.leases or book.waiters:
        book = grants.end(book, book.leases[0].id, list(book.leases[0].devices))
        for one in list(book.waiters):
            book, _ = grants.grant(book, one.id, fresh(book, A, B, C), 9.0)
    assert book.baselines == {}


@pytest.mark.parametrize("content", [{"boot": 5}, {"boot": "x"}, {**Book().to_json_dict(), "leases": [{}]}])
def test_what_is_no_book_is_refused(content: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not in the right form"):
        Book.from_json_dict(content)
    assert Book.from_json_dict({}) == Book()


def test_a_device_that_one_of_two_servers_leaked_on_stays_the_others() -> None:
    book = granted(queue(waiter("group", 1, A)), "group", A)
    for key in (1, 2):
        book = grants.add_tenant(book, "group", Tenant(key, f"rank{key}", KEEPER, (A,), ((100 + key, 5),)))
    book = grants.quarantine(book, "group", A, "rank1 leaks", 9.0, key=1)
    assert set(book.leases[0].devices) == {A}
    assert book.quarantines[A].pids == ((101, 5),), "the other's process is no leak"
    book = queue(waiter("next", 1, A), book=grants.lift(grants.remove_tenant(book, "group", 1), A))
    assert answer_of(book, "next", A) == grants.Waits(), "the other server is on it"
    book = grants.quarantine(book, "group", A, "rank2 leaks", 9.0, key=2)
    assert book.leases == ()
    sure, unsure = book.quarantines[A], replace(book.quarantines[A], is_complete=False)
    again = granted(grants.lift(book, A), "next", A)
    again = grants.quarantine(replace(again, quarantines={A: unsure}), "next", A, "as well", 9.0)
    assert sure.is_complete
    assert not again.quarantines[A].is_complete
