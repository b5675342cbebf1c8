"""Deadlines by key, of which the earliest is asked for."""

from __future__ import annotations

import random

from harness.watchdog.deadlines import Deadlines


def test_the_earliest_is_next() -> None:
    deadlines = Deadlines()
    assert deadlines.next() is None
    for key, deadline in ((1, 5.0), (2, 3.0), (3, 4.0)):
        deadlines.set(key, deadline)
    assert (deadlines.next(), deadlines.of(2), deadlines.of(4)) == (3.0, 3.0, None)


def test_what_has_passed_is_taken_once_in_the_order_of_keys() -> None:
    deadlines = Deadlines()
    for key, deadline in ((3, 1.0), (1, 2.0), (2, 9.0)):
        deadlines.set(key, deadline)
    assert deadlines.take(2.0) == [1, 3]
    assert (deadlines.take(2.0), deadlines.of(1), deadlines.next()) == ([], None, 9.0)


def test_a_deadline_that_is_changed_or_taken_away_does_not_come_back() -> None:
    deadlines = Deadlines()
    for deadline in (1.0, 5.0, 3.0, 3.0, 5.0):
        deadlines.set(1, deadline)
    deadlines.set(2, 0.5)
    deadlines.set(2, None)
    deadlines.set(2, None)
    assert (deadlines.next(), deadlines.take(4.0), deadlines.take(5.0)) == (5.0, [], [1])


def test_as_a_plain_look_at_all_of_them_has_it() -> None:
    chance = random.Random(1)  # noqa: S311 - no secret
    deadlines, plain = Deadlines(), dict[int, float]()
    for _ in range(3000):
        key, at = chance.randrange(9), float(chance.randrange(30))
        if chance.random() < 0.7:
            deadlines.set(key, at)
            plain[key] = at
        elif chance.random() < 0.5:
            deadlines.set(key, None)
            plain.pop(key, None)
        else:
            due = sorted(key for key in plain if plain[key] <= at / 5)
            assert deadlines.take(at / 5) == due
            plain = {key: plain[key] for key in plain if key not in due}
        assert deadlines.next() == min(plain.values(), default=None)
