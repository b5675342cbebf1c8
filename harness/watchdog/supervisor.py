"""The rules of the watchdog: `handle(event, now)` gives the effects that must follow. No I/O, no clock, no sleep.

It never blocks and never raises for an event that can be sent to it: the watchdog must outlive mistakes. Every reply to
a request is decided here, exactly once for each.
"""

from __future__ import annotations

from harness import messages
from harness.lease_messages import DeviceRelease, EndLease, Lease, LeaseStatus, Released, WaitLease
from harness.watchdog import events
from harness.watchdog.deadlines import Deadlines
from harness.watchdog.hangs import Hangs, StopServers
from harness.watchdog.leases import Leases
from harness.watchdog.pending import Pending, Stopping, Waiting
from harness.watchdog.phases import Phase, Sign, after
from harness.watchdog.tracked import Tracked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from harness.watchdog.events import Effect, Event

# A keeper that has not said within this time that it is killing is hung or stopped; it answers in under 1 ms.
KEEPER_ANSWER_S = 1.0
# A keeper that has not said within this time what came of a launch is hung or stopped; it takes some 10 ms, and longer
# where the program is read from a slow file system. The client waits 30 s for the reply.
LAUNCH_LIMIT_S = 10.0
# How long SIGKILL may take before a process is reported as unkillable; a keeper counts the same time on its own.
KILL_LIMIT_S = 5.0
# The root of a lost keeper is dead. What it left has a short grace: nobody would sweep it if the watchdog died as well.
LOST_GRACE_S = 1.0
_IS_STOPPING = "the watchdog is stopping: it starts nothing more"
# SIGRTMAX, signal(7).
_LAST_SIGNAL = 64


class Supervisor:
    """The state of every server of one watchdog, and the rules."""

    def __init__(self, *, crash_grace_s: float) -> None:
        """Take the longest grace that a server gets once the test process is gone, in seconds."""
        self._crash_grace_s = crash_grace_s
        self._servers: dict[int, Tracked] = {}
        self._living = 0
        self._deadlines = Deadlines()
        self._overdue = Deadlines()  # of the servers themselves, from their launch
        self._pending = Pending()
        self._hangs = Hangs()
        self._leases = Leases()
        self._client_is_gone = False
        self._is_closing = False
        self._effects: list[Effect] = []

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take an event at the monotonic time `now`, and give the effects that must follow, in order."""
        self._effects = []
        if isinstance(event, events.Requested):
            self._on_request(event.request_id, event.request, now)
        elif isinstance(event, events.ClientGone):
            self._on_client_gone(event.reason, now)
        elif isinstance(event, (events.OrphansGone, events.OrphansStuck)):
            self._on_orphans(event, now)
        elif isinstance(event, (events.KeeperForked, events.BrokerSaid, events.BrokerLost)):
            self._on_broker_event(event, now)
        elif isinstance(event, events.DebuggerSeen):
            self._hangs.debugger_seen(now)
        elif isinstance(event, events.Tick):
            self._on_tick(now)
        else:
            self._on_server_event(event, now)
        self._settle(now)
        return self._effects

    def next_deadline(self) -> float | None:
        """Give the time of the next Tick that is needed, or None."""
        others = (self._deadlines.next(), self._overdue.next(), self._hangs.deadline, self._leases.next_deadline())
        times = [time for time in others if time is not None]
        return min([*self._pending.deadlines(), *times], default=None)

    def hang_is_due(self, now: float) -> bool:
        """Say whether the next Tick does something about a test that hangs: not while somebody debugs it."""
        return self._hangs.deadline is not None and self._hangs.deadline <= now

    # ---- requests

    def _on_request(self, request_id: int, request: messages.Request, now: float) -> None:
        if isinstance(request, (messages.Launch, messages.Adopt)):
            self._on_launch(request_id, request, now)
        elif isinstance(request, messages.Close):
            self._is_closing = True
            self._hangs.end()
            self._effects += self._leases.close()
            self._stop(request_id, list(self._servers), None, now, leave=True, kill=False)
        elif isinstance(request, (messages.BeginTest, messages.HoldTest, messages.InterruptSeen, messages.EndTest)):
            self._answer(request_id, self._hangs.request(request, now))
        elif isinstance(request, Lease) and (self._is_closing or self._client_is_gone):
            self._fail(request_id, "HarnessError", _IS_STOPPING)
        elif isinstance(request, (Lease, WaitLease, EndLease)):
            self._effects += self._leases.request(request_id, request, now)
        else:
            self._on_server_request(request_id, request, now)

    def _on_launch(self, request_id: int, request: messages.Launch | messages.Adopt, now: float) -> None:
        if self._is_closing or self._client_is_gone:
            self._fail(request_id, "HarnessError", _IS_STOPPING)
            return
        refusal = self._leases.refusal(request) if isinstance(request, messages.Launch) else ""
        if refusal:
            self._fail(request_id, "GpuUnavailable", refusal)
            return
        # The client chose the number, so it can stop a server whose launch it did not see the end of.
        key = request_id
        if key in self._servers:
            self._fail(request_id, "HarnessError", f"there is a server number {key} already")
            return
        server = self._servers[key] = Tracked(key, request.name, request.grace_s, self._deadlines)
        self._living += 1
        self._hangs.launched(key)
        if isinstance(request, messages.Launch):
            server.deadline = now + LAUNCH_LIMIT_S
            if request.deadline_s is not None:
                server.deadline_s = request.deadline_s
                self._overdue.set(key, now + request.deadline_s)
            self._effects.append(events.Spawn(key, request))
        else:
            self._effects.append(events.Take(key, request))

    def _on_server_request(
        self,
        request_id: int,
        request: messages.Stop | messages.SendSignal | messages.Wait | messages.Status,
        now: float,
    ) -> None:
        keys = request.keys if isinstance(request, messages.Stop) else [request.key]
        unknown = [key for key in keys if key not in self._servers]
        if unknown:
            self._fail(request_id, "SpecError", f"this watchdog has no server number {unknown[0]}")
        elif self._pending.is_full_for(request):
            self._fail(request_id, "HarnessError", "too many requests wait for their replies")
        elif isinstance(request, messages.Stop):
            self._stop(request_id, keys, request.grace_s, now, leave=False, kill=request.kill)
        elif isinstance(request, messages.SendSignal):
            self._send_signal(request_id, self._servers[request.key], request.signal)
        elif isinstance(request, messages.Wait):
            server = self._servers[request.key]
            self._pending.add(Waiting(request_id, server, request.until, now + request.timeout_s))
        else:
            self._answer(request_id, self._servers[request.key].status())

    def _send_signal(self, request_id: int, server: Tracked, signal: int) -> None:
        if not 0 < signal <= _LAST_SIGNAL:
            self._fail(request_id, "SpecError", f"{signal} is not a signal")
            return
        if not server.root_exited and server.phase not in {Phase.LAUNCHING, Phase.GONE}:
            self._effects.append(events.Signal(server.key, signal))
        self._answer(request_id, messages.Done())

    # ---- stopping

    def _stop(
        self, request_id: int, keys: list[int], grace_s: float | None, now: float, *, leave: bool, kill: bool
    ) -> None:
        stopping = Stopping(request_id, {key: self._servers[key] for key in keys}, now, leave=leave)
        self._pending.add(stopping)
        servers = list(stopping.servers.values())
        if kill:
            self._kill(servers, now)
        else:
            self._ask(servers, grace_s, now)

    def _ask(self, servers: list[Tracked], grace_s: float | None, now: float, reason: str = "") -> None:
        asked: list[int] = []
        for server in servers:
            if self._move(server, Sign.ASK) and server.phase is Phase.ASKED:
                server.was_asked = True
                server.deadline = None  # of its launch
                server.stop_began = now
                server.reason = reason
                asked.append(server.key)
            if server.phase is Phase.ASKED:
                self._shorten(server, now + (server.grace_s if grace_s is None else grace_s))
        if asked:
            self._effects.append(events.Ask(asked))
            self._effects += self._leases.asked(asked)

    def _shorten(self, server: Tracked, deadline: float) -> None:
        if self._client_is_gone:
            deadline = min(deadline, (server.stop_began or 0.0) + self._crash_grace_s)
        server.deadline = deadline if server.deadline is None else min(server.deadline, deadline)

    def _kill(self, servers: list[Tracked], now: float) -> None:
        if any(server.phase is Phase.LOST for server in servers):
            self._effects.append(events.SweepOrphans(kill=True))
        killed = [server for server in servers if self._move(server, Sign.KILL)]
        for server in killed:
            server.was_killed = True
            server.stop_began = now if server.stop_began is None else server.stop_began
            server.deadline = now + KEEPER_ANSWER_S
        if killed:
            self._effects.append(events.Kill([server.key for server in killed]))
            self._effects += self._leases.asked([server.key for server in killed])

    def _on_client_gone(self, reason: str, now: float) -> None:
        if self._client_is_gone:
            return
        self._client_is_gone = True
        self._hangs.end()
        self._log(f"{reason}: stopping {self._living} servers")
        self._effects += self._leases.close()
        self._ask(list(self._servers.values()), None, now)

    # ---- tests

    def _stop_overdue(self, now: float) -> None:
        for server in [self._servers[key] for key in self._overdue.take(now)]:
            reason = f"its deadline of {server.deadline_s:g} s has passed"
            self._ask([server], None, now, reason)
            self._hangs.server_is_overdue(server.key, f"{server.name!r} was stopped, since {reason}", now)
        for act in self._hangs.due(now):
            if isinstance(act, StopServers):
                self._stop_for_hang(act, now)
            else:
                self._effects.append(act)

    def _stop_for_hang(self, act: StopServers, now: float) -> None:
        keys = list(self._servers) if act.keys is None else act.keys
        servers = [self._servers[key] for key in keys]
        self._ask(servers, None, now, act.reason)
        for server in servers:
            if server.phase is Phase.ASKED:
                # The hung process is ended soon: its servers have the time that a dead one's have.
                self._shorten(server, now + self._crash_grace_s)

    # ---- what happens to servers

    def _on_server_event(self, event: Event, now: float) -> None:
        server = self._servers[event.key]  # type: ignore[union-attr]  # handle() has dealt with the events without key
        if isinstance(event, events.Started):
            self._on_started(server, event)
        elif isinstance(event, events.LaunchFailed):
            self._on_launch_failed(server, event.message, now)
        elif isinstance(event, events.RootExited):
            server.note_exit(event.returncode, now)
            self._move(server, Sign.EXITED)
        elif isinstance(event, events.TreeGone):
            self._end(server, Sign.EMPTY, now)
        elif isinstance(event, events.KillSeen):
            self._on_kill_seen(server, now)
        elif isinstance(event, events.TreeStuck):
            self._end(server, Sign.STUCK, now, event.survivors)
        else:
            self._on_keeper_lost(server, now)

    def _on_started(self, server: Tracked, event: events.Started) -> None:
        server.pid = event.pid
        if self._move(server, Sign.STARTED):
            server.deadline = None
        if server.launch_id is not None:
            self._answer(
                server.launch_id, messages.Launched(server.key, event.pid, event.start_time, event.keeper, event.ports)
            )
            server.launch_id = None
        self._effects += self._leases.started(server.key, event.pid, event.start_time)

    def _on_launch_failed(self, server: Tracked, message: str, now: float) -> None:
        self._fail_launch(server, message)
        self._end(server, Sign.FAILED, now)

    def _fail_launch(self, server: Tracked, message: str) -> None:
        if server.launch_id is not None:
            self._fail(server.launch_id, "LaunchFailed", message)
            server.launch_id = None

    def _on_kill_seen(self, server: Tracked, now: float) -> None:
        if server.phase is Phase.KILLED:
            server.deadline = now + KILL_LIMIT_S + KEEPER_ANSWER_S

    def _on_keeper_lost(self, server: Tracked, now: float) -> None:
        if not self._move(server, Sign.KEEPER_LOST):
            return
        server.keeper_is_lost = True
        self._log(f"the keeper of {server.name!r} died: the watchdog sweeps what it left")
        self._fail_launch(server, f"the keeper of {server.name!r} died while it was launching")
        server.stop_began = now if server.stop_began is None else server.stop_began
        kill_at_once = server.was_killed
        server.was_killed = True
        limit = now if kill_at_once else now + min(server.grace_s, self._crash_grace_s, LOST_GRACE_S)
        server.deadline = limit if server.deadline is None else min(server.deadline, limit)
        self._effects.append(events.SweepOrphans(kill=kill_at_once))

    def _on_orphans(self, event: events.OrphansGone | events.OrphansStuck, now: float) -> None:
        lost = [server for server in self._servers.values() if server.keeper_is_lost]
        for server in lost:
            if isinstance(event, events.OrphansStuck):
                self._end(server, Sign.STUCK, now, event.survivors)
            else:
                self._end(server, Sign.EMPTY, now)

    def _end(self, server: Tracked, sign: Sign, now: float, survivors: list[messages.Survivor] | None = None) -> None:
        if not self._move(server, sign):
            return
        server.survivors = survivors or []
        server.deadline = None
        server.stop_ended = now if server.stop_ended is None else server.stop_ended
        if server.phase is Phase.GONE:
            server.survivors = []
            server.exited_at = now if server.exited_at is None else server.exited_at
            self._effects.append(events.Release(server.key))
            self._fail_launch(server, f"{server.name!r} ended before its program was executed")
        self._effects += self._leases.gone(server.key, now, is_stuck=server.phase is Phase.UNKILLABLE)

    # ---- the memory of devices

    def _on_broker_event(self, event: events.KeeperForked | events.BrokerSaid | events.BrokerLost, now: float) -> None:
        if isinstance(event, events.KeeperForked):
            self._effects += self._leases.forked(event.key, event.launch, event.keeper, event.start_time)
            self._count(self._servers[event.key], owes_memory=True)
        elif isinstance(event, events.BrokerLost):
            lost, effects = self._leases.broker_lost(event.reason, now)
            self._effects += [*effects, events.Log(event.reason)]
            self._release(lost, now)
        elif isinstance(event.report, LeaseStatus):
            self._effects += self._leases.told(event.report, now)
        elif isinstance(event.report, Released):
            self._release({event.report.key: event.report.devices}, now)
        elif self._leases.is_tenant(event.report.key):
            self._effects.append(events.Go(event.report.key))

    def _release(self, released: dict[int, list[DeviceRelease]], now: float) -> None:
        for server in [self._servers[key] for key in released if self._leases.released(key)]:
            server.gpu = released[server.key]
            self._count(server, owes_memory=False)
            if server.phase is Phase.LAUNCHING:
                # Its keeper waits for the broker's word, and would wait for good.
                self._fail_launch(server, f"{server.name!r}: {released[server.key][0].note}")
                self._kill([server], now)

    def _on_tick(self, now: float) -> None:
        self._stop_overdue(now)
        unjudged, effects = self._leases.due(now)
        self._effects += effects
        self._release(unjudged, now)
        due = [self._servers[key] for key in self._deadlines.take(now)]
        for server in due:
            if server.phase is Phase.LAUNCHING:
                self._fail_launch(server, f"{server.name!r} was not started within {LAUNCH_LIMIT_S:g} s")
        self._kill([server for server in due if server.phase in {Phase.LAUNCHING, Phase.ASKED}], now)
        for server in due:
            if server.phase is Phase.LOST:
                self._effects.append(events.SweepOrphans(kill=True))
            elif server.deadline is None:  # else it is to be killed just now
                self._give_up_keeper(server, now)

    def _give_up_keeper(self, server: Tracked, now: float) -> None:
        if server.keeper_was_killed:
            self._end(server, Sign.STUCK, now)  # not even its keeper ends on SIGKILL
            return
        server.keeper_was_killed = True
        server.deadline = now + KILL_LIMIT_S
        self._log(f"the keeper of {server.name!r} does not answer: ending it")
        self._effects.append(events.KillKeeper(server.key))

    # ---- after every event

    def _settle(self, now: float) -> None:
        replies, is_leaving = self._pending.take(now)
        for request_id, reply in replies:
            self._answer(request_id, reply)
        if is_leaving or (self._client_is_gone and not self._living):
            for server in self._servers.values():
                self._fail_launch(server, f"{server.name!r} could not be killed while it was launching")
            self._effects.append(events.Leave())

    def _move(self, server: Tracked, sign: Sign) -> bool:
        phase = after(server.phase, sign)
        has_moved = phase is not server.phase
        if not phase.is_up:
            self._overdue.set(server.key, None)
        self._count(server, phase=phase)
        return has_moved

    def _count(self, server: Tracked, *, phase: Phase | None = None, owes_memory: bool | None = None) -> None:
        # Who lives is counted, and not looked for: an event must not cost more where there are more servers.
        was_gone, was_over = server.phase.is_over, server.is_over
        server.phase = server.phase if phase is None else phase
        server.owes_memory = server.owes_memory if owes_memory is None else owes_memory
        self._living -= server.phase.is_over - was_gone  # -1: it was unkillable, and its keeper is lost
        if server.is_over != was_over:
            self._pending.count(server.key, server.is_over - was_over)

    def _fail(self, request_id: int, error: str, message: str) -> None:
        self._answer(request_id, messages.Failed(error, message))

    def _answer(self, request_id: int, reply: messages.Reply) -> None:
        self._effects.append(events.Answer(request_id, reply))

    def _log(self, text: str) -> None:
        self._effects.append(events.Log(text))
