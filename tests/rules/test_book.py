"""The form of the book in the store: all of it comes back, and nothing else is taken for one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from rules.books import EMPTY, NOW, granted, held, read_back, served, used, waiting

from harness.broker.book import Baseline, Book, Waiter, Want, Who, forget_other_boot
from harness.broker.grants import end, quarantine, set_leaving
from harness.broker.readings import Reading

if TYPE_CHECKING:
    from collections.abc import Callable


def full() -> Book:
    """Give a book in which there is one of everything."""
    book = held(Book(boot="boot"), "a", "AB")
    book = served(served(book, "a", 100), "a", 101, devices="B")
    book = held(book, "s", "C", 1024)
    book = held(book, "t", "C", 2048)
    book = set_leaving(book, "a", "B")
    book = quarantine(held(book, "q", "D"), "q", "D", "it leaks", NOW)
    book = granted(waiting(book, "u", 1, "F"), "u", F=used(5))
    book = waiting(waiting(book, "w", 2, "AB"), "x", 1, "CD", 5000)
    return end(held(book, "gone", "E"), "gone", ["E"])


def content_of(book: Book) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps(book.to_json_dict()))
    return content


def test_everything_comes_back() -> None:
    book = full()
    assert read_back(book) == book
    assert read_back(book).leases_on("B") == [book.leases[0]]
    assert book.generation("E") == 2
    assert book.generation("no such device") == 0


def test_it_may_be_read_without_going_through_text() -> None:
    assert Book.from_json_dict(full().to_json_dict()) == full()


def test_an_empty_store_is_an_empty_book() -> None:
    assert Book.from_json_dict({}) == Book()
    assert read_back(Book()) == Book()


@pytest.mark.parametrize("processes", [None, {}, {1: None}, {1: 0, 4194304: 1 << 40}])
def test_a_baseline_tells_nothing_no_list_and_an_empty_list_apart(processes: dict[int, int | None] | None) -> None:
    book = held(Book(), "a", "A")
    reading = Reading(0, 1 << 40, 1, processes)
    book = Book(leases=book.leases, baselines={"A": Baseline(reading, 0.5)})
    assert read_back(book).baselines["A"].reading == reading


def test_times_may_have_been_written_as_whole_numbers() -> None:
    content = content_of(full())
    content["leases"][0]["since"] = 17
    since = Book.from_json_dict(content).leases[0].since
    assert (since, type(since)) == (17.0, float)


def test_who_takes_room_is_who_is_not_leaving() -> None:
    book = full()
    assert [lease.id for lease in book.holders_of("A")] == ["a"]
    assert book.holders_of("B") == []
    assert [lease.id for lease in book.holders_of("C")] == ["s", "t"]
    assert book.leases_on("D") == []


# ---- what is not one


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Give the path to each value of a book's content, its own included."""
    found = [path]
    for name, value in content.items() if isinstance(content, dict) else enumerate(content):
        found += places(value, (*path, name)) if isinstance(value, (dict, list)) else [(*path, name)]
    return found


def changed(content: dict[str, Any], path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    content = json.loads(json.dumps(content))
    place: Any = content
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return content


def is_taken(content: Any) -> bool:
    """Say whether it is taken for a book; it is refused with ValueError alone."""
    try:
        book = Book.from_json_dict(content)
    except ValueError as error:
        assert str(error).startswith("the store of leases is not in the right form: ")  # noqa: PT017 - either is right
        return False
    assert content_of(book) == content
    return True


def is_text(path: tuple[Any, ...]) -> bool:
    """Say whether any text may stand there."""
    is_uuid = "candidates" in path[:-1] or ("tenants" in path and "devices" in path[:-1])
    return is_uuid or bool({"boot", "id", "name", "test", "reason", "lease"} & set(path[-1:]))


def test_no_value_of_another_kind_is_taken_anywhere() -> None:
    content = content_of(full())
    for path in places(content):
        others: list[Any] = [True, 1.5j, b"", "text", [[]], {"": 1j}, float("nan"), float("inf")]
        for value in others:
            is_right = (value == "text" and is_text(path)) or (value is True and path[-1:] == ("is_complete",))
            assert is_taken(changed(content, path, value)) == is_right, (path, value)


def test_a_number_of_any_size_is_a_number_but_no_time() -> None:
    content = content_of(full())
    for path in places(content):
        before: Any = content
        for name in path:
            before = before[name]
        is_share = before is None and path[-1] != "stale_since"
        is_number = is_share or (type(before) is int and path[-1] != "ticket")
        assert is_taken(changed(content, path, 10**400)) == is_number, path


def test_nothing_may_be_missing() -> None:
    content = content_of(full())
    for path in places(content)[1:]:
        place = without = json.loads(json.dumps(content))
        for name in path[:-1]:
            place = place[name]
        if isinstance(place, dict) and path[-2:-1] not in {("generations",), ("processes",), ("baselines",)}:
            del place[path[-1]]
            assert not is_taken(without), path


def test_only_what_may_be_nothing_may_be_null() -> None:
    content = content_of(full())
    nullable: set[tuple[Any, ...]] = {("waiters", 0, "want", "memory_mib"), ("waiters", 1, "want", "memory_mib")}
    nullable |= {("leases", number, "stale_since") for number in range(4)}
    nullable |= {("leases", 0, "devices", "A"), ("leases", 0, "devices", "B"), ("leases", 3, "devices", "F")}
    nullable |= {("baselines", uuid, "reading", "processes") for uuid in "ABCDF"}
    nullable.add(("baselines", "F", "reading", "processes", "900"))
    found = {path for path in places(content) if is_taken(changed(content, path, None))}
    assert found == nullable


@pytest.mark.parametrize("path", [(), ("leases", 0), ("leases", 0, "tenants", 0), ("leases", 0, "broker")], ids=str)
def test_what_another_version_has_added_is_not_lost_but_refused(path: tuple[Any, ...]) -> None:
    content = content_of(full())
    place: Any = content
    for name in path:
        place = place[name]
    place["added"] = 1
    with pytest.raises(ValueError, match=r"\['added'\] is missing, or too much"):
        Book.from_json_dict(content)


@pytest.mark.parametrize("content", [[], None, "", 0, [{}], "book"])
def test_what_is_no_object_is_no_book(content: Any) -> None:
    with pytest.raises(ValueError, match="not in the right form"):
        Book.from_json_dict(content)


def two_whole(content: dict[str, Any]) -> None:
    content["leases"][1]["devices"]["A"] = None


def whole_and_share(content: dict[str, Any]) -> None:
    content["leases"][1]["devices"]["A"] = 5


def baseline_of_nobody(content: dict[str, Any]) -> None:
    content["baselines"]["E"] = content["baselines"]["A"]


def no_device(content: dict[str, Any]) -> None:
    content["leases"][1]["devices"] = {}


def leaves_anothers(content: dict[str, Any]) -> None:
    content["leases"][0]["leaving"].append("C")


def same_lease(content: dict[str, Any]) -> None:
    content["leases"][2]["id"] = content["leases"][1]["id"]


def lease_that_waits(content: dict[str, Any]) -> None:
    content["waiters"][0]["id"] = content["leases"][1]["id"]


def same_ticket(content: dict[str, Any]) -> None:
    content["waiters"][0]["ticket"] = content["waiters"][1]["ticket"]


def ticket_of_tomorrow(content: dict[str, Any]) -> None:
    content["next_ticket"] = content["waiters"][1]["ticket"]


def no_share(content: dict[str, Any]) -> None:
    content["leases"][1]["devices"]["C"] = 0


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (two_whole, "A is leased whole, and not alone"),
        (whole_and_share, "A is leased whole, and not alone"),
        (baseline_of_nobody, "a baseline of what nobody has"),
        (no_device, "s has no device"),
        (leaves_anothers, "a leaves what it does not have"),
        (same_lease, "an id is there twice"),
        (lease_that_waits, "an id is there twice"),
        (same_ticket, "a ticket is no ticket"),
        (ticket_of_tomorrow, "a ticket is no ticket"),
        (no_share, "0 MiB are no share"),
    ],
)
def test_a_book_that_contradicts_itself_is_refused(spoil: Callable[[dict[str, Any]], None], why: str) -> None:
    content = content_of(full())
    spoil(content)
    with pytest.raises(ValueError, match=why):
        Book.from_json_dict(content)


def test_who_leaves_does_not_contradict_who_has_come() -> None:
    book = set_leaving(held(Book(), "a", "A"), "a", "A")
    book = held(book, "next", "A")
    assert [lease.id for lease in read_back(book).leases_on("A")] == ["a", "next"]


# ---- boots


def test_another_boot_ends_everything() -> None:
    assert forget_other_boot(full(), "next") == Book(boot="next")
    assert forget_other_boot(Book(), "next") == Book(boot="next")


def test_this_boot_ends_nothing() -> None:
    assert forget_other_boot(full(), "boot") == full()


def test_the_types_have_what_the_store_is_read_for() -> None:
    """A waiter is known by its broker for all time, in its PID namespace."""
    waiter = Waiter(1, "i", "n", "t", Who(1, 2, 3), 4.0, Want(1, ("A",), None))
    assert waiter.broker != Who(1, 3, 3)
    assert waiter.broker != Who(1, 2, 4)
    assert held(Book(), "a", "A").baselines["A"] == Baseline(EMPTY, NOW)
    assert used(3).processes == {900: 3 << 20}
