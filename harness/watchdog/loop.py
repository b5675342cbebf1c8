"""The watchdog's loop: turns readiness of file descriptors into events, and carries out the supervisor's effects.

One thread, one epoll. Nothing here decides anything about a server.
"""

from __future__ import annotations

import os
import select
import signal
import time

from harness import messages, procfs
from harness.frames import FrameError
from harness.lease_messages import EndLease, Lease, WaitLease
from harness.watchdog import events, limits, reaping
from harness.watchdog.adopting import Adopting
from harness.watchdog.brokering import Brokering
from harness.watchdog.orphans import Orphans
from harness.watchdog.supervisor import Supervisor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from harness.watchdog.client_process import ClientProcess
    from harness.watchdog.kept import Kept
    from harness.watchdog.ledger import Ledger
    from harness.watchdog.log import Log
    from harness.watchdog.pipe import PipeEnd

_REQUESTS = (
    messages.Launch,
    messages.Adopt,
    messages.Stop,
    messages.SendSignal,
    messages.Wait,
    messages.Status,
    messages.Close,
    messages.BeginTest,
    messages.HoldTest,
    messages.InterruptSeen,
    messages.EndTest,
    Lease,
    WaitLease,
    EndLease,
)


_UNSENT_BYTES = 1 << 20
_LAST_REPLIES_S = 1.0
# epoll_wait(2) counts milliseconds in 31 bits, and Python raises OverflowError for more.
_LONGEST_POLL_S = 86400.0


class Loop:
    """Everything that the watchdog process does after it has been set up."""

    def __init__(
        self,
        pipe: PipeEnd,
        client: ClientProcess,
        owners: list[int],
        wakeup: int,
        *,
        log: Log,
        open_ledger: Callable[[], Ledger],
        crash_grace_s: float,
    ) -> None:
        """Take the Pipe, pidfds on the processes whose end is the run's end, and the descriptor that signals wake."""
        self._open_ledger = open_ledger
        self._ledger: Ledger | None = None
        self._pipe = pipe
        self._client = client
        self._owners = owners
        self._wakeup = wakeup
        self._log = log
        self._crash_grace_s = crash_grace_s
        self._supervisor = Supervisor(crash_grace_s=crash_grace_s)
        self._kept: dict[int, Kept] = {}
        self._keepers: dict[int, Kept] = {}
        self._roots: dict[int, Kept] = {}
        self._adopting = Adopting(self._watch, self._forget, self._tell)
        self._brokering = Brokering(self._watch, self._forget, self._tell, log=log.path)
        self._orphans = Orphans(lambda: self._brokering.pids | frozenset(self._keepers))
        self._epoll = select.epoll()
        self._sources: dict[int, Callable[[], None]] = {}
        self._is_told_to_end = False
        self._reaper = reaping.Reaper()
        self._effects = self._acts()

    def _acts(self) -> dict[type[events.Effect], Callable[..., None]]:
        return {
            events.Spawn: self._spawn,
            events.Go: self._go,
            events.TellBroker: lambda effect: self._brokering.send(effect.order),
            events.EndBroker: lambda _effect: self._brokering.kill(),
            events.Take: self._take,
            events.Ask: self._ask,
            events.Kill: self._kill,
            events.Signal: self._signal,
            events.KillKeeper: self._kill_keeper,
            events.SweepOrphans: self._sweep_orphans,
            events.Release: self._release,
            events.Answer: self._answer,
            events.InterruptClient: lambda effect: self._client.interrupt(effect.test.signal),
            events.EndClient: self._end_client,
            events.Log: lambda effect: self._log.write(effect.text),
            events.Leave: lambda _effect: self._leave(),
        }

    def run(self) -> NoReturn:
        """Run until the supervisor says to leave. SIGTERM to this process stops all servers and ends it."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._watch(self._pipe.descriptor, self._read_pipe)
        for owner in self._owners:
            self._watch(owner, self._see_owner_end)
        self._watch(self._wakeup, self._see_signals)
        while True:
            for descriptor, _ in self._epoll.poll(self._timeout_s()):
                source = self._sources.get(descriptor)
                if source is not None:
                    self._guard(source)
            if self._reaper.has_more:
                self._guard(self._reap)
            self._guard(self._see_time)

    def _guard(self, step: Callable[[], None]) -> None:
        # A mistake in one step must not end the owner of every server.
        try:
            step()
        except Exception as error:  # noqa: BLE001 - see above
            self._log.mistake(error)

    def _timeout_s(self) -> float:
        if self._reaper.has_more:
            return 0
        others = (self._orphans.deadline, self._adopting.deadline, self._brokering.deadline)
        deadlines = (self._supervisor.next_deadline(), *others)
        times = [deadline for deadline in deadlines if deadline is not None]
        return min(max(0.0, min(times) - time.monotonic()), _LONGEST_POLL_S) if times else -1

    def _watch(self, descriptor: int, source: Callable[[], None]) -> None:
        self._epoll.register(descriptor, select.EPOLLIN)
        self._sources[descriptor] = source

    def _forget(self, descriptor: int) -> None:
        if self._sources.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def _tell(self, event: events.Event) -> None:
        failures: list[Exception] = []
        for effect in self._supervisor.handle(event, time.monotonic()):
            try:
                self._effects[type(effect)](effect)
            except Exception as error:  # noqa: BLE001, PERF203 - the effects that follow must be carried out as well
                failures.append(error)
        if failures:
            raise failures[0]

    # ---- sources of events

    def _on_sigterm(self, _signal: int, _frame: object) -> None:
        self._is_told_to_end = True

    def _read_pipe(self) -> None:
        self._flush()
        if self._pipe.unsent_bytes > _UNSENT_BYTES:
            return  # a client that asks and asks but reads no reply is not listened to, or these would fill the memory
        try:
            received = self._pipe.receive()
        except EOFError:
            self._end_of_client("the test process has closed the Pipe")
        except FrameError as error:
            self._end_of_client(f"the test process has sent {error}")
        else:
            for message_id, data in received:
                self._request(message_id, data)

    def _request(self, message_id: int, data: bytes) -> None:
        try:
            request = messages.decode(data)
        except messages.MessageError as error:
            self._answer(events.Answer(message_id, messages.Failed("HarnessError", str(error))))
            return
        if not isinstance(request, _REQUESTS):
            self._answer(events.Answer(message_id, messages.Failed("HarnessError", "that is not a request")))
            return
        try:
            self._tell(events.Requested(message_id, request))
        except Exception as error:  # noqa: BLE001 - the client waits for a reply, whatever went wrong
            self._log.mistake(error)
            failed = messages.Failed("HarnessError", f"the watchdog failed: {type(error).__name__} (see its log)")
            self._answer(events.Answer(message_id, failed))

    def _see_owner_end(self) -> None:
        for owner in self._owners:
            self._forget(owner)
        self._end_of_client("the test process, or the controller of its run, has ended")

    def _end_of_client(self, reason: str) -> None:
        self._forget(self._pipe.descriptor)
        self._tell(events.ClientGone(reason))

    def _see_signals(self) -> None:
        try:
            os.read(self._wakeup, 4096)
        except BlockingIOError:
            return
        if self._is_told_to_end:
            self._is_told_to_end = False
            self._tell(events.ClientGone("the watchdog was told to end (SIGTERM)"))
        self._reap()

    def _reap(self) -> None:
        others: list[int] = []
        try:
            for pid, status in self._reaper.batch():
                self._reaped(pid, status, others)
        finally:
            self._orphans.reaped(others)

    def _reaped(self, pid: int, status: int, others: list[int]) -> None:
        if pid in self._keepers:
            self._keeper_ended(self._keepers.pop(pid))
        elif pid in self._roots:
            others.append(pid)
            self._tell(events.RootExited(self._roots.pop(pid).key, os.waitstatus_to_exitcode(status)))
        elif not self._brokering.reaped(pid):
            others.append(pid)

    def _keeper_ended(self, kept: Kept) -> None:
        self._read_keeper(kept)
        self._forget(kept.control.fileno())
        kept.control.close()
        if not kept.is_empty:
            kept.note_orphans(self._orphans.fresh())
            self._tell(events.KeeperLost(kept.key))

    def _read_keeper(self, kept: Kept) -> None:
        while (report := kept.read()) is not None:
            self._on_report(kept, report)
        if kept.is_hung_up:
            self._forget(kept.control.fileno())

    def _on_report(self, kept: Kept, report: messages.Message) -> None:
        if isinstance(report, messages.RootStarted):
            start_time = kept.root_started(report.pid)
            self._roots[report.pid] = kept
            self._tell(events.Started(kept.key, report.pid, start_time, kept.pid, kept.ports))
        elif isinstance(report, messages.RootFailed):
            kept.is_empty = True
            self._tell(events.LaunchFailed(kept.key, f"{kept.name!r}: {report.message}"))
        elif isinstance(report, messages.KillBegun):
            self._tell(events.KillSeen(kept.key))
        elif isinstance(report, messages.RootExit):
            self._tell(events.RootExited(kept.key, report.returncode))
        elif isinstance(report, messages.Unkilled):
            self._tell(events.TreeStuck(kept.key, report.survivors))
        else:
            kept.is_empty = True
            self._tell(events.TreeGone(kept.key))

    def _see_time(self) -> None:
        now = time.monotonic()
        if self._supervisor.hang_is_due(now) and self._client.is_in_use():
            self._tell(events.DebuggerSeen())
        deadline = self._supervisor.next_deadline()
        if deadline is not None and deadline <= now:
            self._tell(events.Tick())
        if self._orphans.deadline is not None and self._orphans.deadline <= now:
            event = self._orphans.step()
            if event is not None:
                self._tell(event)
        self._adopting.see_time(now)
        self._brokering.see_time(now)

    # ---- effects

    def _spawn(self, effect: events.Spawn) -> None:
        # Idle watchdogs are many, and need no sockets: the first launch imports what all launches need.
        try:
            from harness.watchdog.kept import Kept  # noqa: PLC0415 - see above

            if self._ledger is None:
                self._ledger = self._open_ledger()
            kept = Kept(effect.key, effect.launch, self._log, self._ledger, crash_grace_s=self._crash_grace_s)
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing was started, and the client must be told
            reason = limits.describe(error) if isinstance(error, OSError) else type(error).__name__
            self._tell(events.LaunchFailed(effect.key, f"{effect.launch.name!r}: cannot launch: {reason}"))
            return
        self._kept[kept.key] = self._keepers[kept.pid] = kept
        try:
            self._watch(kept.control.fileno(), lambda: self._read_keeper(kept))
        except OSError:
            kept.end_keeper()  # unheard it is of no use; its end is seen, and its tree swept
        if effect.launch.lease is not None:
            found = procfs.stat(kept.pid)
            start_time = found.start_time if found is not None else 0
            self._tell(events.KeeperForked(kept.key, effect.launch, kept.pid, start_time))

    def _go(self, effect: events.Go) -> None:
        if effect.key in self._kept:
            self._kept[effect.key].order(messages.GoOrder())

    def _take(self, effect: events.Take) -> None:
        try:
            self._adopting.take(effect.key, effect.adopt)
        except Exception as error:  # noqa: BLE001 - whatever it is, the client must be told
            reason = f"{effect.adopt.name!r}: cannot adopt: {type(error).__name__}"
            self._tell(events.LaunchFailed(effect.key, reason))

    def _ask(self, effect: events.Ask) -> None:
        kept = [self._kept[key] for key in effect.keys if key in self._kept]
        asked = [server.ask_root() for server in kept]
        for key in effect.keys:
            self._adopting.ask(key)
        for server, root_asked in zip(kept, asked, strict=True):
            server.order(messages.AskOrder(root_asked))

    def _kill(self, effect: events.Kill) -> None:
        for key in effect.keys:
            if key in self._kept:
                self._kept[key].order(messages.KillOrder())
            else:
                self._adopting.kill(key)

    def _signal(self, effect: events.Signal) -> None:
        if effect.key in self._kept:
            self._kept[effect.key].signal_root(effect.signal)
        else:
            self._adopting.signal(effect.key, effect.signal)

    def _kill_keeper(self, effect: events.KillKeeper) -> None:
        kept = self._kept.get(effect.key)
        if kept is not None and self._keepers.get(kept.pid) is kept:
            kept.end_keeper()

    def _sweep_orphans(self, effect: events.SweepOrphans) -> None:
        lost = [kept for kept in self._kept.values() if self._keepers.get(kept.pid) is not kept]
        for kept in lost if effect.kill else []:
            kept.kill_cgroup()
        self._orphans.begin(kill=effect.kill)

    def _release(self, effect: events.Release) -> None:
        kept = self._kept.pop(effect.key, None)
        if kept is not None:
            kept.release()
            if self._roots.get(kept.root) is kept:
                del self._roots[kept.root]

    def _end_client(self, effect: events.EndClient) -> None:
        self._log.write(effect.text)
        self._client.end(effect.test, effect.text)

    def _answer(self, effect: events.Answer) -> None:
        self._pipe.send(effect.request_id, messages.encode(effect.reply))
        self._flush()

    def _flush(self) -> None:
        if self._pipe.descriptor in self._sources:
            self._pipe.flush()
            reads = 0 if self._pipe.unsent_bytes > _UNSENT_BYTES else select.EPOLLIN
            self._epoll.modify(self._pipe.descriptor, reads | (select.EPOLLOUT if self._pipe.unsent_bytes else 0))

    def _leave(self) -> NoReturn:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # it is being done
        # The Pipe holds some 280 replies; where more threads wait, the last one is Close's.
        self._pipe.finish(_LAST_REPLIES_S)
        self._brokering.end()
        if self._ledger is not None:
            self._ledger.close()
        self._log.write("all servers have been stopped: leaving")
        os._exit(0)
