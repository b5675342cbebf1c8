"""Who launches what in this test process, for those who report of it.

It knows who owns what is launched just now: a test, or a fixture that is being set up. Without a listener a launch
costs a look at an empty list. A listener must not raise: nobody's launch fails for the sake of a report.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable


class Owner(NamedTuple):
    """Who launched a server: a test, or a fixture of this `scope` that was set up for it; `name` is its id or name."""

    name: str
    scope: str


_listeners: list[Callable[[object], None]] = []
_owners: list[Owner] = []


def listen(listener: Callable[[object], None]) -> None:
    """Give this function every server from now on, when it has been launched."""
    _listeners.append(listener)


def unlisten(listener: Callable[[object], None]) -> None:
    """Give it no more."""
    _listeners.remove(listener)


def launched(server: object) -> None:
    """Say that a server has been launched."""
    for listener in _listeners:
        listener(server)


def enter(owner: Owner) -> None:
    """Say that what is launched from now on is this owner's."""
    _owners.append(owner)


def leave(owner: Owner) -> None:
    """Say that this owner launches nothing more; nor do those that it entered in the meantime."""
    if owner in _owners:
        del _owners[len(_owners) - 1 - _owners[::-1].index(owner) :]


def owner() -> Owner | None:
    """Give whose it is what is launched now; None outside of tests."""
    return _owners[-1] if _owners else None
