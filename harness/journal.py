"""What happens to servers, as this test process sees it, for those who listen: reports, summaries, progress lines.

It also knows who owns what is launched just now: a test, or a fixture that is being set up. Without a listener a note
costs a function call. A listener must not raise: nobody's launch fails for the sake of a report.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

# How often a long wait says that it goes on, in seconds.
WORD_S = 1.0


class Event(NamedTuple):
    """Something that happened. `facts` can be written as JSON; `subject` is the server that it is about, if any."""

    kind: str
    monotonic_s: float
    facts: dict[str, object]
    subject: object


class Owner(NamedTuple):
    """Who launched a server: a test or a fixture of this `scope`, with its `name`, for the `test` that it was set up for."""

    name: str
    scope: str
    test: str
    number: int


_listeners: list[Callable[[Event], None]] = []
_owners: list[Owner] = []


def listen(listener: Callable[[Event], None]) -> None:
    """Tell this function of every event from now on."""
    _listeners.append(listener)


def unlisten(listener: Callable[[Event], None]) -> None:
    """Tell it no more."""
    _listeners.remove(listener)


def is_heard() -> bool:
    """Say whether anybody listens."""
    return bool(_listeners)


def note(kind: str, subject: object = None, **facts: object) -> None:
    """Say that something has happened just now."""
    if _listeners:
        event = Event(kind, time.monotonic(), facts, subject)
        for listener in list(_listeners):
            listener(event)


def enter(owner: Owner) -> None:
    """Say that what is launched from now on is this owner's."""
    _owners.append(owner)


def leave(owner: Owner) -> None:
    """Say that this owner launches nothing more."""
    if owner in _owners:
        del _owners[_owners.index(owner) :]


def owner() -> Owner | None:
    """Give whose it is what is launched now; None outside of tests."""
    return _owners[-1] if _owners else None
