"""The watchdog of this process, for who has none in hand: the drop-ins, which are made to be called from anywhere.

In a pytest run with the plugin it is the run's. Elsewhere (a script, unittest, a child that a test has forked) it is
one of this process's own, which is started when it is first asked for, and ends with the process.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.client import Watchdog


class _Process:
    """What is known of this process; a forked child begins anew."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.sources: list[Callable[[], Watchdog]] = []
        self.own: Watchdog | None = None


_process = _Process()


def _begin_anew() -> None:
    global _process  # noqa: PLW0603 - one for each process; the old one's lock may be held by a thread that is not here
    _process = _Process()


if hasattr(os, "register_at_fork"):  # elsewhere nothing can be forked
    os.register_at_fork(after_in_child=_begin_anew)


def use(source: Callable[[], Watchdog]) -> None:
    """Have `watchdog` give what this gives; for the plugin. Of nested runs (pytester's) the innermost counts."""
    _process.sources.append(source)


def use_no_more(source: Callable[[], Watchdog]) -> None:
    """Undo `use`."""
    if source in _process.sources:
        _process.sources.remove(source)


def watchdog() -> Watchdog:
    """Give this process's watchdog, which is started if it has to be; from any thread.

    Raises PlatformNotSupported or HarnessError where none can be.
    """
    with _process.lock:
        if _process.sources:
            return _process.sources[-1]()
        if _process.own is None or not _process.own.is_alive:
            from harness.client import Watchdog  # noqa: PLC0415 - the plugin imports this module in every run

            _process.own = Watchdog().start()
        return _process.own
