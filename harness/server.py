"""A server, as the test sees it."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from harness import asynchronous, journal, logs, messages, procfs, signals, specs, stopping, templates, waiting
from harness.errors import HarnessError, NotReady, SpecError
from harness.outcomes import ServerOutcome, StopReport, outcome_facts
from harness.popen import ServerProcess
from harness.readiness_history import ReadinessHistory

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from harness.link import Link

_NO_STATUS = messages.ServerStatus(0, "running", root_exited=False, returncode=None, exited_at=None, reason="")


class Server:
    """One server: a root process and everything that it starts, owned by the watchdog.

    Made by `Watchdog.launch`, `ServerGroup.launch` and `Watchdog.adopt`. As a context manager it is stopped at the end.
    """

    def __init__(
        self,
        link: Link,
        launched: messages.Launched,
        spec: specs.ServerSpec,
        *,
        log_path: Path,
        devices: tuple[str, ...] = (),
    ) -> None:
        """Not for users: a server is made by launching it."""
        self._link = link
        self._launched = launched
        self.name = spec.name or ""
        self.log_path = log_path
        self.ready = spec.ready
        self.ready_timeout_s = spec.ready_timeout_s
        self.grace_s = spec.grace_s
        self.gpus = devices
        self.shares_gpus = spec.gpus is not None and spec.gpus.memory_mib is not None
        self.host = templates.HOST
        self.launched_at = time.monotonic()
        self.readiness = ReadinessHistory(self.launched_at)
        # For the plugin: who must stop it, and whether its end may be what the test wants.
        self.owner: journal.Owner | None = None
        self.was_signalled = False
        self.ended_at: float | None = None
        self._pgid = self.pid if launched.keeper else _group_of(self.pid)
        self._status = _NO_STATUS
        self._outcome: ServerOutcome | None = None

    def __repr__(self) -> str:
        """Name the server and its root."""
        return f"<Server {self.name!r} pid={self.pid} port={self._launched.ports.get('')}>"

    # ---- what it is

    @property
    def key(self) -> int:
        """Give the number by which the watchdog knows this server."""
        return self._launched.key

    @property
    def link(self) -> Link:
        """Give the connection to its watchdog, for the plugin."""
        return self._link

    @property
    def pid(self) -> int:
        """Give the root's pid."""
        return self._launched.pid

    @property
    def start_time(self) -> int:
        """Give the root's start time: with the pid, its identity (field 22 of /proc/PID/stat, in clock ticks)."""
        return self._launched.start_time

    @property
    def pgid(self) -> int:
        """Give the root's process group; a launched server leads its own group and session."""
        return self._pgid

    @property
    def port(self) -> int:
        """Give the port that is held for `{port}`; raises HarnessError for an adopted server, which has none."""
        if "" not in self._launched.ports:
            raise HarnessError(f"{self.name!r} was adopted: the harness holds no port for it", server=self.name)
        return self._launched.ports[""]

    @property
    def ports(self) -> dict[str, int]:
        """Give the ports that were asked for by name in `ports=`."""
        return {name: port for name, port in self._launched.ports.items() if name}

    @property
    def ports_by_name(self) -> dict[str, int]:
        """Give every port that is held for it, the main one as "port"; for reports."""
        return {name or "port": port for name, port in self._launched.ports.items()}

    def url(self, path: str = "") -> str:
        """Give the http URL of a path on the main port."""
        separator = "/" if path and not path.startswith("/") else ""
        return f"http://{self.host}:{self.port}{separator}{path}"

    def log_tail(self, lines: int = 50) -> str:
        """Give the last lines of its standard output and error."""
        return logs.tail(self.log_path, lines)

    # ---- how it is

    def status(self) -> messages.ServerStatus:
        """Ask the watchdog how the server is; what is final is not asked again."""
        if self._status.phase == "gone":
            return self._status
        if not self._link.is_closed:
            self._status = self._link.request(messages.Status(self.key), messages.ServerStatus)
        elif not self._is_there():
            self._status = self._status.replaced(phase="gone", root_exited=True)
        return self._status

    def _is_there(self) -> bool:
        # Without a watchdog: its keeper stays until the tree is empty.
        is_kept = self._launched.keeper and self._link.keeper_is_alive(self._launched.keeper)
        return bool(is_kept) or procfs.is_alive(self.pid, self.start_time)

    @property
    def state(self) -> str:
        """Give running, detached (the root has exited, its tree lives), asked, killed, lost, unkillable or gone."""
        return self.status().phase

    @property
    def returncode(self) -> int | None:
        """Give the root's return code in `subprocess.Popen`'s convention; None while it runs, or if it is not known."""
        return self.status().returncode

    @property
    def is_alive(self) -> bool:
        """Say whether any process of the server is left."""
        return self.status().phase != "gone"

    def pids(self) -> list[int]:
        """Give the pids of the whole tree: the root, what it started, daemons included."""
        if self._launched.keeper:
            is_kept = self.is_alive and self._link.keeper_is_alive(self._launched.keeper)
            found = procfs.descendants(self._launched.keeper) if is_kept else []
        else:
            is_there = procfs.is_alive(self.pid, self.start_time)
            found = [self.pid, *procfs.descendants(self.pid)] if is_there else []
        return found

    # ---- waiting

    def wait_ready(self, timeout_s: float | None = None) -> Server:
        """Wait until the readiness check given at launch holds, and return this server.

        `timeout_s` overrides the launch's `ready_timeout_s` (480 s by default). Raises NotReady (it still runs),
        ServerExited (what it left has been stopped), or NotReady if the check raises (the server has been stopped).
        """
        __tracebackhide__ = True
        waiting.wait_ready([self], specs.optional_seconds(timeout_s, "timeout_s"))
        return self

    wait_ready_async = asynchronous.form_of(wait_ready, limit_s=asynchronous.CHECK_S)

    def wait(self, timeout_s: float | None = None) -> ServerOutcome:
        """Wait until no process of the server is left, without stopping it; raises NotReady after `timeout_s`."""
        __tracebackhide__ = True
        limit = specs.optional_seconds(timeout_s, "timeout_s")
        if not self.wait_until("gone", limit):
            raise NotReady(f"{self.name!r} (pid {self.pid}) still runs after {limit} s", server=self.name)
        return self._stop(None)

    wait_async = asynchronous.form_of(wait)

    def wait_until(self, until: str, timeout_s: float | None) -> bool:
        """Wait until the root has exited ("exit") or the tree is gone ("gone"); False after `timeout_s`."""
        __tracebackhide__ = True
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = waiting.SLICE_S if deadline is None else min(waiting.SLICE_S, deadline - time.monotonic())
            if self._is_reached(until):
                return True
            if left < 0:
                return False
            wait = messages.Wait(self.key, until, left)
            self._status = self._link.request(wait, messages.ServerStatus, timeout_s=left)

    def _is_reached(self, until: str) -> bool:
        status = self.status()
        return status.phase in {"gone", "unkillable"} or (until == "exit" and status.root_exited)

    # ---- ending

    def stop(self, *, grace_s: float | None = None) -> ServerOutcome:
        """Ask the server to exit, wait its grace, kill what is left; return when no process of it is left."""
        limit = specs.optional_seconds(grace_s, "grace_s")
        return self._stop(limit)

    stop_async = asynchronous.form_of(stop)

    def kill(self) -> ServerOutcome:
        """Kill the whole tree at once, without asking; return when no process of it is left."""
        return self._stop(None, kill=True)

    def _stop(self, limit_s: float | None, *, kill: bool = False) -> ServerOutcome:
        if not self.has_ended:
            stopping.stop(self._link, [self], limit_s, kill=kill)
        if self._outcome is None:
            raise HarnessError(f"{self.name!r} has no outcome")
        return self._outcome

    def record(self, outcome: ServerOutcome) -> None:
        """Keep the outcome of a stop; one that is final is not asked for again."""
        is_news = outcome != self._outcome
        phase = "unkillable" if outcome.how == "unkillable" else "gone"
        self._status = messages.ServerStatus(
            self.key, phase, True, outcome.returncode, outcome.exited_at, outcome.reason
        )
        self._outcome = outcome
        self.ended_at = self.ended_at or time.monotonic()
        if is_news:
            self.note("ended", died=self.has_failed(self._status), **outcome_facts(outcome))

    def has_failed(self, status: messages.ServerStatus) -> bool:
        """Say whether, by this state of it, its root ended with anything but 0, and nobody asked it to."""
        if self.was_signalled or (self._outcome is not None and self._outcome.how != "exited"):
            return False
        return status.root_exited and not status.reason and status.returncode not in {0, None}

    def note(self, kind: str, **facts: object) -> None:
        """Say in the journal that something has happened to it."""
        journal.note(kind, self, server=self.name, id=f"{self._link.pid}-{self.key}", **facts)

    @property
    def has_ended(self) -> bool:
        """Say whether its end is known for good; a server that was unkillable may still end."""
        return self._outcome is not None and self._outcome.how != "unkillable"

    @property
    def outcome(self) -> ServerOutcome | None:
        """Give how the server ended, once it has been stopped or waited for."""
        return self._outcome

    def send_signal(self, sig: int) -> None:
        """Send a signal to the root; does nothing if it has exited, or for 0. Raises SpecError for no signal."""
        if isinstance(sig, bool) or sig not in {0, *signal.valid_signals()}:
            raise SpecError(f"{sig!r} is not a signal")
        if self.status().phase != "gone" and sig:
            self.was_signalled = True
            self._link.request(messages.SendSignal(self.key, int(sig)), messages.Done)

    @property
    def proc(self) -> ServerProcess:
        """Give what `subprocess.Popen` offers, with its meaning: it speaks of the root alone."""
        return ServerProcess(self)

    def describe_exit(self) -> str:
        """Say how the root ended, and why the watchdog ended it if it did so unasked, in words."""
        status = self.status()
        why = f" (stopped by the watchdog: {status.reason})" if status.reason else ""
        return signals.describe(status.returncode) + why

    def __enter__(self) -> Server:  # noqa: PYI034 - typing.Self is there from Python 3.11 on
        """Give the server itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server; raises Leaked or GpuNotReleased if something is left and the body raised nothing."""
        outcome = self.stop()
        if error is None:
            StopReport((outcome,), outcome.seconds).raise_if_leaked()

    async def __aenter__(self) -> Server:  # noqa: PYI034 - as above
        """Give the server itself."""
        return self

    __aexit__ = asynchronous.uncancellable(__exit__)


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return pid
