"""Which servers a test had to do with, and what became of them while it ran."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from harness import journal, logs
from harness.errors import HarnessError
from harness.reporting import oom

if TYPE_CHECKING:
    from collections.abc import Collection

    from harness.journal import Event, Owner
    from harness.server import Server


class Witness:
    """Sees every server of this process, of whichever watchdog, from its launch on."""

    def __init__(self) -> None:
        """Begin before the first test."""
        self._there: list[Server] = []
        self._ended: list[Server] = []
        self._kills: dict[Server, dict[str, int]] = {}
        self._evidence: dict[Server, str] = {}
        self.began = time.monotonic()
        self._sizes: dict[Server, int] = {}

    def see(self, event: Event) -> None:
        """Take an event of the journal."""
        if event.kind == "launched":
            server: Server = event.subject  # type: ignore[assignment]  # the journal knows no servers
            self._there.append(server)
            self._kills[server] = oom.counters()

    def begin_test(self) -> None:
        """Say that a test begins: what its servers have written before is not its own."""
        self.began = time.monotonic()
        ended = [server for server in self._there if server.has_ended]
        for server in ended:
            self._kills.pop(server, None)
            self._evidence.pop(server, None)
        self._there = [server for server in self._there if not server.has_ended]
        self._sizes = {server: logs.size(server.log_path) for server in self._there}

    def written_before(self, server: Server) -> int:
        """Give how many bytes of its log a server had written when the test began."""
        return self._sizes.get(server, 0)

    def used(self, fixtures: Collection[str]) -> list[Server]:
        """Give the servers that a test with these fixtures had to do with, in the order of their launch."""
        return [server for server in self._there if self._is_used(server, fixtures)]

    def _is_used(self, server: Server, fixtures: Collection[str]) -> bool:
        if server.launched_at >= self.began or server.owner is None or self.died_in_test(server):
            return True
        return server.owner.scope != "function" and server.owner.name in fixtures

    def died_in_test(self, server: Server) -> bool:
        """Say whether the server failed during this test, with nobody having asked it to end."""
        exited_at = _exited_at(server)
        return exited_at is not None and exited_at >= self.began and has_failed(server)

    def deaths(self) -> list[Server]:
        """Give the servers that failed during this test."""
        return [server for server in self._there if self.died_in_test(server)]

    def why(self, server: Server) -> str:
        """Say whether the out-of-memory killer ended it, and how that is known; "" if nothing speaks for it."""
        if server not in self._evidence and server in self._kills:
            self._evidence[server] = oom.evidence(server.pid, server.launched_at, self._kills[server])
        return self._evidence.get(server, "")

    def left_by(self, owner: Owner) -> list[Server]:
        """Give the servers of a test or a fixture that has ended which still run."""
        return [server for server in self._there if server.owner is owner and is_running(server)]


def has_failed(server: Server) -> bool:
    """Say whether a server's root ended by itself with anything but 0: nobody signalled, stopped or deadlined it."""
    if server.was_signalled or (server.outcome is not None and server.outcome.how != "exited"):
        return False
    with contextlib.suppress(HarnessError):
        status = server.status()
        return status.root_exited and not status.reason and status.returncode not in {0, None}
    return False


def is_running(server: Server) -> bool:
    """Say whether any process of the server is left, and nobody has stopped it."""
    with contextlib.suppress(HarnessError):
        return server.outcome is None and server.is_alive
    return False


def _exited_at(server: Server) -> float | None:
    if server.outcome is not None:
        return server.outcome.exited_at
    with contextlib.suppress(HarnessError):
        return server.status().exited_at
    return None
