"""The fixtures. They also work when only they are imported into a conftest, without the plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import run_report, session
from harness.errors import GpuUnavailable, SpecError

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
    report = run_report.of(request.config)
    if report is not None:
        report.look_at_test()  # before this stops what the last test has left
    # The plugin has reported those that tests have stopped, each with its test.
    is_reported = session.reports_leaks(request.config)
    owner.stop([server for server in owner.servers if not (is_reported and server.has_ended)]).raise_if_leaked()


@pytest.fixture
def server_group(watchdog: Watchdog, request: pytest.FixtureRequest) -> Iterator[ServerGroup]:
    """Give a group of servers that are stopped in parallel when the test ends.

    With `@pytest.mark.gpus(n)` the test waits in its setup for so many GPUs (or for those in a list of UUIDs and
    indexes), which are the group's. It is skipped, with the reason, where this machine has too few, or none.
    """
    marker = request.node.get_closest_marker("gpus")
    if marker is None:
        with watchdog.group(request.node.name) as group:
            yield group
        return
    with watchdog.group(request.node.name, gpus=_gpus_of(marker)) as group:
        try:
            group.lease_gpus()
        except GpuUnavailable as error:
            if error.is_absent:
                pytest.skip(str(error))
            raise
        yield group


def _gpus_of(marker: pytest.Mark) -> object:
    if len(marker.args) != 1 or marker.kwargs:
        raise SpecError("@pytest.mark.gpus takes one argument: a number of GPUs, or a list of UUIDs and indexes")
    return marker.args[0]
