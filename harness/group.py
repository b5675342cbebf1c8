"""Servers that are stopped together."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from harness import asynchronous, journal, specs, waiting
from harness.errors import HarnessError, SpecError
from harness.launching import Launcher
from harness.leasing import SharedLease

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from harness.leasing import GpuLease
    from harness.outcomes import StopReport
    from harness.server import Server
    from harness.specs import GpuWish


class _Owner(Protocol):
    """What a group needs of its watchdog."""

    def launch_spec(self, spec: specs.ServerSpec, register: Callable[[Server], None]) -> Server: ...

    def launch_on(
        self, spec: specs.ServerSpec, lease: GpuLease, devices: tuple[str, ...], register: Callable[[Server], None]
    ) -> Server: ...

    def new_lease(self, name: str) -> GpuLease: ...

    def stop(self, servers: Iterable[Server], *, grace_s: float | None = None) -> StopReport: ...


class ServerGroup(Launcher):
    """Some servers of one watchdog. Leaving it as a context manager stops them all in parallel.

    Servers may be launched from several threads.
    """

    def __init__(self, owner: _Owner, name: str, gpus: GpuWish | None = None) -> None:
        """Not for users: a group is made by `Watchdog.group`."""
        self._owner = owner
        self.name = name
        self._leased = None if gpus is None else SharedLease(self._new_lease, gpus)
        self._lock = threading.Lock()
        # Who has which name; None while it is being launched.
        self._named: dict[str, Server | None] = {}
        self._servers: list[Server] = []
        self._has_been_left = False
        # What is launched in it is its own, whoever launches.
        self._group_owner = journal.owner()

    def _new_lease(self) -> GpuLease:
        lease = self._owner.new_lease(self.name)
        lease.owner = self._group_owner or lease.owner
        return lease

    def __repr__(self) -> str:
        """Name the group and its servers."""
        return f"<ServerGroup {self.name!r} {[server.name for server in self.servers]}>"

    @property
    def servers(self) -> tuple[Server, ...]:
        """Give the servers that were launched in this group, in that order."""
        with self._lock:
            return tuple(self._servers)

    def launch_spec(self, spec: specs.ServerSpec) -> Server:
        """Start a server whose name is unique in the group; for `launch` only."""
        __tracebackhide__ = True  # as in `launch`
        name = self._reserve(spec.name)
        try:
            return self._launch(replace(spec, name=name, owner=self._group_owner))
        except BaseException:
            with self._lock:
                self._named.pop(name)
            raise

    def _launch(self, spec: specs.ServerSpec) -> Server:
        __tracebackhide__ = True
        if self._leased is None:
            return self._owner.launch_spec(spec, self._add)
        specs.check_devices_are_not_named(dict.fromkeys(spec.templated))
        share = self._leased.share(spec.gpus)
        with share:
            share.server = self._owner.launch_on(spec, share.lease, share.devices, self._add)
        return share.server

    def lease_gpus(self) -> tuple[str, ...]:
        """Wait for the group's GPUs now, not at its first launch; give their UUIDs. Raises GpuUnavailable."""
        if self._leased is None:
            raise SpecError(f"group {self.name!r} was made without gpus=")
        return self._leased.share(None).devices

    def _reserve(self, name: str | None) -> str:
        with self._lock:
            if self._has_been_left:
                raise HarnessError(f"group {self.name!r} has been left: it launches nothing more")
            if name is not None and not self._is_free(name):
                raise SpecError(f"group {self.name!r} has a server named {name!r} already")
            chosen = name if name is not None else self._free_name()
            self._named[chosen] = None
            return chosen

    def _is_free(self, name: str) -> bool:
        if name not in self._named:
            return True
        holder = self._named[name]
        return holder is not None and holder.outcome is not None  # a rank that was stopped may be launched again

    def _free_name(self) -> str:
        number = len(self._named)
        while f"{self.name}-{number}" in self._named:
            number += 1
        return f"{self.name}-{number}"

    def _add(self, server: Server) -> None:
        with self._lock:
            self._servers.append(server)
            self._named[server.name] = server
            is_late = self._has_been_left
        if is_late:
            server.stop()
            raise HarnessError(f"group {self.name!r} was left while {server.name!r} was launching: it has been stopped")

    def wait_ready(self, timeout_s: float | None = None) -> ServerGroup:
        """Wait for all at once, and return this group; the first server that dies or fails ends the wait for all.

        Servers that have been stopped are not waited for. Raises what `Server.wait_ready` raises. Without `timeout_s`
        each server has its own `ready_timeout_s`.
        """
        pending = [server for server in self.servers if server.outcome is None]
        waiting.wait_ready(pending, specs.optional_seconds(timeout_s, "timeout_s"))
        return self

    wait_ready_async = asynchronous.form_of(wait_ready, limit_s=asynchronous.CHECK_S)

    def stop(self, *, grace_s: float | None = None) -> StopReport:
        """Stop all servers of the group in parallel; return when no process of them is left.

        The group's GPUs are given back as soon as their memory is.
        """
        if self._leased is not None:
            with asynchronous.put_off():  # a cancelled stop has been ordered in any case
                self._leased.end()
        return self._owner.stop(self.servers, grace_s=grace_s)

    stop_async = asynchronous.form_of(stop)

    def __enter__(self) -> ServerGroup:  # noqa: PYI034 - typing.Self is there from Python 3.11 on
        """Give the group itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop all servers; raises Leaked if something survived and the body raised nothing."""
        with self._lock:
            self._has_been_left = True
        if self._leased is not None:
            self._leased.close()
        report = self.stop()
        if error is None:
            report.raise_if_leaked()

    async def __aenter__(self) -> ServerGroup:  # noqa: PYI034 - as above
        """Give the group itself."""
        return self

    __aexit__ = asynchronous.uncancellable(__exit__)
