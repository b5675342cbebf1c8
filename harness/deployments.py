"""Ranks of a data-parallel deployment that are started at the same time: none can be ready without the others.

So the first that fails ends the wait for all, also where each is started by a thread of its own that knows of no other.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

from harness import journal
from harness.errors import HarnessError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Deployment:
    """Ranks that are being started at the same time for one test or fixture, or a server that is none."""

    def __init__(self, owner: journal.Owner | None = None, place: object = None) -> None:
        """Begin with none."""
        self.owner = owner
        self.place = place
        self.starting = 0
        self._failure = ""

    def check(self) -> None:
        """Raise HarnessError if a rank has failed."""
        if self._failure:
            raise HarnessError(f"another rank of its deployment has failed: {self._failure}")

    @property
    def has_failed(self) -> bool:
        """Say whether a rank has failed: who starts now is none of it, but its next attempt."""
        return bool(self._failure)

    def fail(self, error: BaseException) -> None:
        """Say why a rank will never be ready; of several the first counts."""
        self._failure = self._failure or getattr(error, "message", "") or f"{type(error).__name__}: {error}"


# Those of which some rank is being started.
_deployments: list[Deployment] = []
_lock = threading.Lock()


@contextlib.contextmanager
def starting(place: object) -> Iterator[Deployment]:
    """Start a server in here; unless `place` is None, as a rank of the deployment whose ranks meet there.

    Of those, the ones count that are being started just now for the same test or fixture.
    """
    deployment = Deployment() if place is None else _join(place)
    try:
        yield deployment
    except BaseException as error:
        deployment.fail(error)
        raise
    finally:
        if place is not None:
            _leave(deployment)


def _begin_anew() -> None:
    global _lock  # noqa: PLW0603 - it may be held by a thread that is not here
    _lock = threading.Lock()
    _deployments.clear()


if hasattr(os, "register_at_fork"):  # elsewhere nothing can be forked
    os.register_at_fork(after_in_child=_begin_anew)


def _join(place: object) -> Deployment:
    owner = journal.owner()
    with _lock:
        known = [each for each in _deployments if each.owner is owner and each.place == place and not each.has_failed]
        found = known[0] if known else None
        if found is None:
            found = Deployment(owner, place)
            _deployments.append(found)
        found.starting += 1
        return found


def _leave(deployment: Deployment) -> None:
    with _lock:
        deployment.starting -= 1
        if deployment.starting == 0:
            _deployments.remove(deployment)
