"""What happens to servers, as this test process sees it, for those who report of it.

It also knows who owns what is launched just now: a test, or a fixture that is being set up. Without a listener a note
costs a look at an empty list. A listener must not raise: nobody's launch or stop fails for the sake of a report.
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import CodeType

# How often a long wait says that it goes on, in seconds; some can be asked for a word only about once in a second.
_WORD_S = 0.9


class Event(NamedTuple):
    """Something that happened at a moment of `time.monotonic()`. `facts` can be written as JSON.

    `subject` is the server or the lease that it is about, if it is about one.
    """

    kind: str
    monotonic_s: float
    facts: dict[str, object]
    subject: object


class Owner(NamedTuple):
    """Who launched a server: a test, or a fixture of this `scope` that was set up for it; `name` is its id or name."""

    name: str
    scope: str


_listeners: list[Callable[[Event], None]] = []
_owners: list[Owner] = []
_makers: dict[CodeType, Owner] = {}


def listen(listener: Callable[[Event], None]) -> None:
    """Tell this function of every event from now on, in the thread in which it happens."""
    _listeners.append(listener)


def unlisten(listener: Callable[[Event], None]) -> None:
    """Tell it of no more."""
    _listeners.remove(listener)


def note(kind: str, subject: object = None, **facts: object) -> None:
    """Say that something has happened just now."""
    if _listeners:
        event = Event(kind, time.monotonic(), facts, subject)
        for listener in (*_listeners,):  # one may leave in the meantime
            listener(event)


class Wait:
    """A wait that may take long: it says about once in a second that it goes on, and in the end that it is over."""

    _numbers = itertools.count(1)

    def __init__(self, what: str, names: list[str], limit_s: float) -> None:
        """Begin to wait: `what` is "ready", "stop" or "gpus", for the servers of these names, at most `limit_s`."""
        self._fixed: dict[str, object] = {"wait": next(self._numbers), "what": what, "limit_s": limit_s}
        self._names = names
        self._began = time.monotonic()
        self._next = self._began + _WORD_S
        self._has_spoken = False

    @property
    def seconds(self) -> float:
        """Give how long it has been."""
        return time.monotonic() - self._began

    @property
    def is_due(self) -> bool:
        """Say whether it is time for a word."""
        return time.monotonic() >= self._next

    def say(self, awaited: str, log: object = "", names: list[str] | None = None) -> None:
        """Say what is awaited, and where to read on: the server's log."""
        self._next = time.monotonic() + _WORD_S
        self._has_spoken = True
        facts = {"servers": names or self._names, "seconds": round(self.seconds, 3), "awaited": awaited}
        note("waiting", **self._fixed, **facts, log=str(log))

    def end(self) -> None:
        """Say that it is over, if it has said anything."""
        if self._has_spoken:
            note("waited", **self._fixed)


def enter(owner: Owner) -> None:
    """Say that what is launched from now on is this owner's."""
    _owners.append(owner)


def leave(owner: Owner) -> None:
    """Say that this owner launches nothing more; nor do those that it entered in the meantime."""
    if owner in _owners:
        del _owners[len(_owners) - 1 - _owners[::-1].index(owner) :]


def own_functions(owner: Owner, codes: Iterable[CodeType]) -> None:
    """Say that what these functions launch in this thread is this owner's, whoever calls them."""
    _makers.update(dict.fromkeys(codes, owner))


def disown_functions(owner: Owner) -> None:
    """Say that they launch for whoever calls them."""
    for code in [code for code, whose in _makers.items() if whose is owner]:
        del _makers[code]


def owner() -> Owner | None:
    """Give whose it is what is launched now; None outside of tests."""
    frame = sys._getframe(1) if _makers else None  # noqa: SLF001 - inspect's form of it reads source files
    while frame is not None:
        if frame.f_code in _makers:
            return _makers[frame.f_code]
        frame = frame.f_back
    return _owners[-1] if _owners else None
