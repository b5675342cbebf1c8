"""Random histories of the book: what must hold after each step, and that nobody waits for ever."""

from __future__ import annotations

import random
from collections import Counter

from rules.book_world import BookWorld

KINDS = {
    *("granted", "shared", "handed over early", "quarantined", "lifted"),
    *("back from the dead", "quarantined after the dead"),
}


def test_whatever_happens_the_book_keeps_its_word() -> None:
    """See BookWorld: who is granted what, what is let go of, and what is really on the devices at that moment."""
    happened: Counter[str] = Counter()
    for seed in range(28):
        world = BookWorld(random.Random(seed))  # noqa: S311 - no secret
        for _ in range(160):
            world.step()
        world.come_to_rest()
        happened += world.happened
    assert happened.keys() == KINDS, "the histories are too short to show everything"
