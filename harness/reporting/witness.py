"""Which servers a test had to do with, and what became of them while it ran."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from harness import logs
from harness.errors import HarnessError
from harness.reporting import oom

if TYPE_CHECKING:
    from collections.abc import Collection

    from harness.journal import Owner
    from harness.leasing import GpuLease
    from harness.messages import ServerStatus
    from harness.server import Server


class Witness:
    """Sees every server of this process, of whichever watchdog, from its launch on."""

    def __init__(self, began: float) -> None:
        """Begin in the midst of a test, which began at the monotonic time `began`."""
        self._there: list[Server] = []
        self._kills: dict[Server, dict[str, int]] = {}
        self._evidence: dict[Server, str] = {}
        self._sizes: dict[Server, int] = {}
        self._is_lost = False
        self._leases: list[GpuLease] = []
        self._charged: set[object] = set()
        self.began = began

    def see(self, server: Server) -> None:
        """Take a server that has just been launched."""
        self._kills[server] = oom.counters()
        self._there.append(server)

    def see_lease(self, lease: GpuLease) -> None:
        """Take a lease that has just been granted."""
        self._leases.append(lease)

    def begin_test(self) -> None:
        """Say that a test begins: what servers have written before is not its own, and who has ended is forgotten."""
        self.began = time.monotonic()
        self._is_lost = False
        # In place: another thread may be launching.
        for server in [server for server in self._there if server.has_ended]:
            self._there.remove(server)
            self._kills.pop(server, None)
        for lease in [lease for lease in self._leases if lease.is_given_back]:
            self._leases.remove(lease)
        self._charged = {what for what in self._charged if what in self._there or what in self._leases}
        self._evidence = {}
        self._sizes = {server: logs.size(server.log_path) for server in list(self._there)}

    def of(self, owner: Owner) -> list[Server]:
        """Give the servers that this owner launched, those that have ended in this test included."""
        return [server for server in list(self._there) if server.owner is owner]

    def leases_of(self, owner: Owner) -> list[GpuLease]:
        """Give the leases that this owner took and did not give back."""
        return [lease for lease in list(self._leases) if lease.owner is owner and not lease.is_given_back]

    def charge(self, what: object) -> bool:
        """Say whether a server or a lease is charged to somebody for the first time."""
        is_first = what not in self._charged
        self._charged.add(what)
        return is_first

    def status(self, server: Server) -> ServerStatus | None:
        """Give a server's state; None if its watchdog does not tell: one that hangs is asked once in a test."""
        if self._is_lost and not server.has_ended:
            return None
        try:
            return server.status()
        except HarnessError:
            self._is_lost = True
            return None

    def written_before(self, server: Server) -> int:
        """Give how many bytes of its log a server had written when the test began."""
        return self._sizes.get(server, 0)

    def used(self, fixtures: Collection[str]) -> list[Server]:
        """Give the servers that a test with these fixtures had to do with: those that died in it, then as launched."""
        used = [server for server in self._there if self._is_used(server, fixtures)]
        return sorted(used, key=lambda server: not self.died_in_test(server))

    def _is_used(self, server: Server, fixtures: Collection[str]) -> bool:
        if server.launched_at >= self.began or server.owner is None or self.died_in_test(server):
            return True
        return server.owner.scope != "function" and server.owner.name in fixtures

    def dead(self) -> list[Server]:
        """Give all servers that failed during this test."""
        return [server for server in list(self._there) if self.died_in_test(server)]

    def deaths(self) -> list[Server]:
        """Give the servers that are not this test's alone, and failed during it."""
        return [server for server in self.dead() if self._is_shared(server)]

    def _is_shared(self, server: Server) -> bool:
        return server.owner.scope != "function" if server.owner is not None else server.launched_at < self.began

    def died_in_test(self, server: Server) -> bool:
        """Say whether the server failed during this test."""
        exited_at = self.exited_at(server)
        return exited_at is not None and exited_at >= self.began and self.has_failed(server)

    def exited_at(self, server: Server) -> float | None:
        """Give when the root exited (`time.monotonic()`), None if it runs or that is not known."""
        if server.outcome is not None:
            return server.outcome.exited_at
        status = self.status(server)
        return status.exited_at if status is not None else None

    def has_failed(self, server: Server) -> bool:
        """Say whether a server's root ended with anything but 0, and neither a stop nor a signal had asked it to."""
        status = self.status(server)
        return status is not None and server.has_failed(status)

    def why(self, server: Server) -> str:
        """Say whether the out-of-memory killer ended it, and how that is known; "" if nothing speaks for it."""
        if server not in self._evidence:
            before = self._kills.get(server, {})
            self._evidence[server] = oom.evidence(server.pid, server.launched_at, before)
        return self._evidence[server]
