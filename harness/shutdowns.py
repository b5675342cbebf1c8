"""Ends many things at once: all of it is done whatever fails, and what failed is raised when it has been done."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from harness import stopping
from harness.errors import HarnessError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from harness.link import Link
    from harness.server import Server


def stops_of(servers: Iterable[Server]) -> list[Callable[[], object]]:
    """Give what stops these servers: one step for each watchdog, which stops all of its own in parallel."""
    by_link: dict[Link, list[Server]] = {}
    for server in servers:
        if not server.has_ended and (not server.link.is_closed or server.is_alive):
            by_link.setdefault(server.link, []).append(server)
    return [_stop_of(link, found) for link, found in by_link.items()]


def _stop_of(link: Link, servers: list[Server]) -> Callable[[], object]:
    return lambda: stopping.stop(link, servers, None)


def run(at_once: Sequence[Callable[[], object]], afterwards: Sequence[Callable[[], object]]) -> None:
    """Do the first in parallel, then the others in order; raise, when all is done, what the first that failed raised.

    The text of the others is added to its own. An interrupt (Ctrl-C) is raised at once; what was begun goes on.
    """
    errors: list[Exception] = []
    threads = [threading.Thread(target=_run_one, args=(step, errors), daemon=True) for step in at_once[1:]]
    for thread in threads:
        thread.start()
    for step in at_once[:1]:
        _run_one(step, errors)
    for thread in threads:
        thread.join()
    for step in afterwards:
        _run_one(step, errors)
    _raise(errors)


def _run_one(step: Callable[[], object], errors: list[Exception]) -> None:
    try:
        step()
    except Exception as error:  # noqa: BLE001 - what is left has to be stopped first; `_raise` raises it
        errors.append(error)


def _raise(errors: list[Exception]) -> None:
    texts = list(dict.fromkeys(str(error) for error in errors))
    if len(texts) == 1:
        raise errors[0]
    if texts:
        kind = type(errors[0]) if isinstance(errors[0], HarnessError) else HarnessError
        raise kind("\n".join(texts)) from errors[0]
