"""`Watchdog`: the front door."""

from __future__ import annotations

import itertools
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness import (
    asynchronous,
    journal,
    leasing,
    logs,
    messages,
    platform,
    private,
    procfs,
    specs,
    state_dir,
    stopping,
)
from harness.errors import GpuUnavailable, HarnessError, LaunchFailed, SpecError, WatchdogDied
from harness.forking import WatchdogProcess
from harness.group import ServerGroup
from harness.launching import Launcher
from harness.leasing import GpuLease
from harness.link import Link
from harness.outcomes import StopReport
from harness.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from harness.specs import StrPath

DEFAULT_CRASH_GRACE_S = 5.0


class Watchdog(Launcher):
    """One watchdog process, which owns every server that is launched through it.

    Use it as a context manager, or call `start` and `close`. When this process ends in any way, or hangs and is killed,
    the watchdog asks every server to exit, kills what is left after `crash_grace_s` (at most), and ends.

    `state_dir`: see the README, "State". `log_dir`: where servers' logs are kept; by default they are in the state
    directory and are removed a day after this process has ended. A launch waits at most `gpu_wait_s` for GPUs; their
    memory may take `gpu_release_s` to come back. Raises SpecError for a wrong argument.
    """

    def __init__(
        self,
        *,
        state_dir: StrPath | None = None,
        log_dir: StrPath | None = None,
        crash_grace_s: float = DEFAULT_CRASH_GRACE_S,
        gpu_wait_s: float = leasing.DEFAULT_WAIT_S,
        gpu_release_s: float = leasing.DEFAULT_RELEASE_S,
    ) -> None:
        """Take the options; nothing is started yet."""
        self._given_state_dir = None if state_dir is None else specs.text(state_dir, "state_dir")
        self._given_log_dir = None if log_dir is None else Path(specs.text(log_dir, "log_dir")).absolute()
        self._crash_grace_s = specs.seconds(crash_grace_s, "crash_grace_s")
        self._wait_s = specs.seconds(gpu_wait_s, "gpu_wait_s")
        self._release_s = specs.seconds(gpu_release_s, "gpu_release_s")
        self._state_dir = Path()
        self._link: Link | None = None
        self._log_dir = Path()
        self._lock = threading.Lock()
        self._servers: list[Server] = []
        self._leases: list[GpuLease] = []
        self._names = itertools.count()
        # What is launched here is its; the plugin's watchdog has none, and leaves it to who launches.
        self.owner = journal.owner()

    def __repr__(self) -> str:
        """Name the process and how many servers it has been given."""
        return f"<Watchdog pid={self._link.pid if self._link else None} servers={len(self._servers)}>"

    def start(self) -> Watchdog:
        """Fork the watchdog, and return this object; does nothing if it has been started.

        Raises PlatformNotSupported where the platform lacks something, HarnessError for a bad state directory.
        """
        if self._link is None:
            self._fork(self._new_run())
        return self

    def _new_run(self) -> Path:
        platform.check()
        return state_dir.new_run(self._given_state_dir)

    _new_run_async = asynchronous.form_of(_new_run)

    def _fork(self, run: Path) -> None:
        self.attach(WatchdogProcess(run / "watchdog.log", crash_grace_s=self._crash_grace_s), run)

    def attach(self, process: WatchdogProcess, run: Path) -> Watchdog:
        """Use a watchdog process that has been forked already, with its directory; for the plugin."""
        self._log_dir = self._given_log_dir or run
        self._state_dir = run.parent.parent
        self._link = Link(process)
        return self

    @property
    def link(self) -> Link:
        """Give the connection to the watchdog process, for the plugin; raises HarnessError before it is started."""
        return self._started()

    def _started(self) -> Link:
        if self._link is None:
            raise HarnessError("this watchdog has not been started: use `with Watchdog() as watchdog`, or call start()")
        return self._link

    @property
    def pid(self) -> int | None:
        """Give the pid of the watchdog process, None before it is started."""
        return self._link.pid if self._link else None

    @property
    def is_alive(self) -> bool:
        """Say whether the watchdog process runs, and belongs to this process."""
        return self._link is not None and self._link.is_alive

    @property
    def servers(self) -> tuple[Server, ...]:
        """Give every server that was launched or adopted, in that order, those that have ended included."""
        with self._lock:
            return tuple(self._servers)

    def launch_spec(self, spec: specs.ServerSpec, register: Callable[[Server], None] | None = None) -> Server:
        """Start a server that has been checked; for `launch`, and for groups, which register it."""
        __tracebackhide__ = True  # the request holds the environment, which a traceback must not show
        link = self._started()
        name = spec.name if spec.name is not None else f"{Path(spec.command[0]).name}-{next(self._names)}"
        if spec.gpus is None:
            return self._launch_on(link, replace(spec, name=name), None, (), register)
        lease = self.new_lease(name)
        try:
            lease.take(spec.gpus, is_for_one=True)
            return self._launch_on(link, replace(spec, name=name), lease, lease.devices, register)
        except BaseException:
            lease.end()
            raise

    def new_lease(self, name: str) -> GpuLease:
        """Make a lease that nothing has been asked for yet; for `launch` and for groups."""
        terms = leasing.terms(self._state_dir, self._wait_s, self._release_s)
        lease = GpuLease(self._started(), terms, name)
        lease.owner = self.owner or journal.owner()
        with self._lock:
            self._leases = [known for known in self._leases if not known.is_given_back]
            self._leases.append(lease)
        return lease

    @property
    def leased(self) -> frozenset[str]:
        """Give the UUIDs of the devices that groups and servers of this watchdog have leased for themselves alone."""
        with self._lock:
            of_groups = {uuid for lease in self._leases if not lease.is_given_back for uuid in lease.devices}
        alone = [server for server in self.servers if server.gpus and not server.shares_gpus and not server.has_ended]
        return frozenset(of_groups.union(*(server.gpus for server in alone)))

    def launch_on(
        self, spec: specs.ServerSpec, lease: GpuLease, devices: tuple[str, ...], register: Callable[[Server], None]
    ) -> Server:
        """Start a server that has been checked on some devices of a group's lease; for groups."""
        __tracebackhide__ = True
        return self._launch_on(self._started(), spec, lease, devices, register)

    def _launch_on(
        self,
        link: Link,
        spec: specs.ServerSpec,
        lease: GpuLease | None,
        devices: tuple[str, ...],
        register: Callable[[Server], None] | None,
    ) -> Server:
        __tracebackhide__ = True
        name = spec.name or ""
        spec = replace(spec, owner=self._owner_of(spec))
        log_path = self._new_log(name, spec.owner)
        request = messages.Launch(
            name=name,
            command=spec.command,
            environment=specs.environment_on(spec, devices),
            templated=list(spec.templated),
            cwd=spec.cwd,
            ports=list(spec.ports),
            log_path=str(log_path),
            log_dir=str(self._log_dir),
            ask=spec.ask,
            grace_s=spec.grace_s,
            deadline_s=spec.deadline_s,
            lease=None if lease is None else lease.number,
            devices=list(devices),
            port=spec.port,
            host=spec.host,
            is_literal=spec.is_literal,
        )
        try:
            return self._launch(link, request, spec, log_path, register)
        except (LaunchFailed, GpuUnavailable):
            log_path.unlink(missing_ok=True)
            raise

    def _launch(
        self,
        link: Link,
        request: messages.Launch | messages.Adopt,
        spec: specs.ServerSpec,
        log_path: Path,
        register: Callable[[Server], None] | None = None,
    ) -> Server:
        __tracebackhide__ = True
        link.longest_grace_s = max(link.longest_grace_s, spec.grace_s)
        key = link.new_key()
        try:
            devices = tuple(request.devices) if isinstance(request, messages.Launch) else ()
            server = Server(link, link.launch(key, request), spec, log_path=log_path, devices=devices)
            server.owner = self._owner_of(spec)
            with self._lock:
                self._servers.append(server)
            server.note("launched", **_facts_of(server, spec))
            if register is not None:
                register(server)
        except WatchdogDied:
            self._abandon(link, key)  # a launch that takes too long may still succeed
            raise
        except HarnessError:
            raise
        except BaseException:
            self._abandon(link, key)  # Ctrl-C, or pytest-timeout's SIGALRM
            raise
        else:
            return server

    def _abandon(self, link: Link, key: int) -> None:
        stopped = link.abandon(key)
        if stopped is not None:
            stopping.record([server for server in self.servers if (server.link, server.key) == (link, key)], stopped)

    def _owner_of(self, spec: specs.ServerSpec) -> journal.Owner | None:
        return spec.owner or self.owner or journal.owner()

    def _new_log(self, name: str, owner: journal.Owner | None) -> Path:
        try:
            if self._given_log_dir is None:
                os.close(private.open_run(str(self._log_dir), make=True))
            return logs.new_path(self._log_dir, name, owner.name if owner is not None else "")
        except OSError as error:
            raise SpecError(f"cannot make the log directory {self._log_dir}: {error.strerror}") from None

    def adopt(self, pid: int, *, name: str | None = None, grace_s: float = specs.DEFAULT_GRACE_S) -> Server:
        """Own a process that this process started itself: it is stopped like a server, also after a crash.

        Best effort: a daemon that leaves its tree unseen is not found, and its return code is known to its parent
        alone, which must reap it. Raises SpecError if `pid` is no living descendant of this process.
        """
        chosen = specs.name(name) if name is not None else f"adopted-{pid}"
        return self.adopt_spec(pid, specs.ServerSpec(name=chosen, grace_s=specs.seconds(grace_s, "grace_s")))

    def adopt_spec(self, pid: int, spec: specs.ServerSpec, register: Callable[[Server], None] | None = None) -> Server:
        """Own a process by a specification that has been checked; for `adopt`, and for drop-ins, which register it."""
        link = self._started()
        found = self._own_descendant(link, pid)
        request = messages.Adopt(spec.name or "", pid, found.start_time, spec.grace_s)
        try:
            return self._launch(link, request, spec, Path(os.devnull), register)
        except LaunchFailed as error:
            raise SpecError(str(error)) from None

    def _own_descendant(self, link: Link, pid: int) -> procfs.Stat:
        if isinstance(pid, bool) or not isinstance(pid, int) or pid <= 0:
            raise SpecError(f"a pid is a number above 0, not {pid!r}")
        found = procfs.stat(pid)
        if found is None or found.state in "ZX":
            raise SpecError(f"there is no living process {pid}")
        if pid == link.pid or pid in procfs.descendants(link.pid) or pid not in procfs.descendants(os.getpid()):
            raise SpecError(f"process {pid} was not started by this process: only its own can be adopted")
        return found

    def group(self, name: str | None = None, *, gpus: object = None) -> ServerGroup:
        """Make a group: servers that are launched through it are stopped together.

        `gpus` (as for `launch`) are leased together by its first launch, and given back by its stop. A server that is
        launched in it with `gpus=` takes its share of them, one without sees all.
        """
        chosen = specs.name(name) if name is not None else f"group-{next(self._names)}"
        return ServerGroup(self, chosen, specs.gpus(gpus))

    def stop(self, servers: Iterable[Server], *, grace_s: float | None = None) -> StopReport:
        """Stop any servers of this watchdog in parallel; return when no process of them is left.

        `grace_s` overrides each server's own. Servers that have been stopped already report how they ended.
        """
        link = self._started()
        limit = specs.optional_seconds(grace_s, "grace_s")
        chosen = list(dict.fromkeys(servers))
        foreign = set(chosen) - set(self.servers)
        if foreign:
            raise SpecError(f"{foreign.pop()!r} is not a server of this watchdog")
        pending = [server for server in chosen if not server.has_ended]
        seconds = 0.0
        if pending:
            seconds = stopping.stop(link, pending, limit).seconds
        return StopReport(tuple(server.outcome for server in chosen if server.outcome is not None), seconds)

    stop_async = asynchronous.form_of(stop)

    def close(self) -> StopReport:
        """Stop every server in parallel, and end the watchdog. A second call reports the same.

        Raises WatchdogDied if the watchdog had died, in which case the keepers have stopped the servers.
        """
        if self._link is None:
            return StopReport((), 0.0)
        self._link.close()
        seconds = 0.0
        if self._link.report is not None:
            stopping.record(self.servers, self._link.report)
            seconds = self._link.report.seconds
        return StopReport(tuple(s.outcome for s in self.servers if s.outcome is not None), seconds)

    def __enter__(self) -> Watchdog:  # noqa: PYI034 - typing.Self is there from Python 3.11 on
        """Start the watchdog."""
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop everything; raises Leaked if something survived and the body raised nothing."""
        report = self.close()
        if error is None:
            report.raise_if_leaked()

    async def __aenter__(self) -> Watchdog:  # noqa: PYI034 - as above
        """Start the watchdog."""
        if self._link is None:
            run = await self._new_run_async()
            if self._link is None:  # another task may have entered it meanwhile
                self._fork(run)  # some milliseconds, and in this thread: to fork changes the warning filters of all
        return self

    __aexit__ = asynchronous.uncancellable(__exit__)


def _facts_of(server: Server, spec: specs.ServerSpec) -> dict[str, object]:
    owner = server.owner or journal.Owner("", "")
    return {
        "server_pid": server.pid,
        # Not the arguments: some are tokens.
        "program": Path(spec.command[0]).name if spec.command else "",
        "ports": server.ports_by_name,
        "gpus": list(server.gpus),
        "log": str(server.log_path),
        "owner": owner.name,
        "scope": owner.scope,
    }
