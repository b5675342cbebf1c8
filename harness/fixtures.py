"""The fixtures. They also work when only they are imported into a conftest, without the plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import session

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.client import Watchdog
    from harness.group import ServerGroup


@pytest.fixture(scope="session")
def watchdog(request: pytest.FixtureRequest) -> Iterator[Watchdog]:
    """Give the watchdog of this test process (of this worker, under pytest-xdist).

    At the end of the session every server that is still there is stopped, all in parallel.
    """
    owner = session.watchdog_of(request.config)
    yield owner
    owner.stop(owner.servers).raise_if_leaked()


@pytest.fixture
def server_group(watchdog: Watchdog, request: pytest.FixtureRequest) -> Iterator[ServerGroup]:
    """Give a group of servers that are stopped in parallel when the test ends."""
    with watchdog.group(request.node.name) as group:
        yield group
