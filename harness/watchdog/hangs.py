"""When a running test is taken for hung, and what follows. Pure: no I/O, no clock, no sleep.

Once its deadline has passed the test process is interrupted; the servers that the test launched are stopped as soon as
the process has answered, or has not; later all others; at last the process itself is ended. Each step is a chance for
the test to fail by itself. A debugger at work suspends all of it: nothing passes while somebody looks.
"""

from __future__ import annotations

from enum import Enum

from harness.messages import BeginTest, Done, HoldTest, InterruptSeen, Overdue
from harness.records import Record
from harness.watchdog.events import EndClient, InterruptClient

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

    from harness.messages import EndTest, Reply

# How long an interrupted test process may take to say that a debugger is at work, before its servers are stopped.
ANSWER_S = 1.0
# While a debugger that does not say when it ends is at work, it is looked for again after this time.
LOOK_AGAIN_S = 5.0


class Stage(Enum):
    """What has been done about the running test."""

    WATCHED = "nothing: its deadline has not passed"
    INTERRUPTED = "its process was interrupted"
    STRIPPED = "the servers that it launched are being stopped"
    BARE = "all servers are being stopped"
    ENDED = "its process was ended"


_FOLLOWING = {
    Stage.WATCHED: Stage.INTERRUPTED,
    Stage.INTERRUPTED: Stage.STRIPPED,
    Stage.STRIPPED: Stage.BARE,
    Stage.BARE: Stage.ENDED,
}


class StopServers(Record):
    """Ask servers to exit: those with these keys, or all (None)."""

    keys: list[int] | None
    reason: str


Act: TypeAlias = StopServers | InterruptClient | EndClient


class Hangs:
    """The running test, and the moment at which the next step is due (`deadline`, None: never)."""

    def __init__(self) -> None:
        """Begin without a test."""
        self._test: BeginTest | None = None
        self._keys: list[int] = []
        self._stage = Stage.WATCHED
        self._reason = ""
        self._spared_s = 0.0
        self._left_s: float | None = None
        self._is_held = False
        self.deadline: float | None = None

    def request(self, request: BeginTest | HoldTest | InterruptSeen | EndTest, now: float) -> Reply:
        """Take what the client says of its test, and give the reply."""
        if isinstance(request, BeginTest):
            self.begin(request, now)
        elif isinstance(request, HoldTest):
            self.hold(now, is_held=request.is_held)
        elif isinstance(request, InterruptSeen):
            return Overdue(self.interrupt_seen(now, is_debugging=request.is_debugging))
        else:
            self.end()
        return Done()

    def begin(self, test: BeginTest, now: float) -> None:
        """Begin to watch a test; the one before it has ended."""
        self.end()
        self._test = test
        if test.deadline_s is not None:
            self.deadline = now + test.deadline_s

    def end(self) -> None:
        """Watch no test any more."""
        self._test = None
        self._keys = []
        self._stage = Stage.WATCHED
        self._reason = ""
        self._spared_s = 0.0
        self._left_s = None
        self._is_held = False
        self.deadline = None

    def launched(self, key: int) -> None:
        """Take a server as the running test's own."""
        self._keys.append(key)

    def server_is_overdue(self, key: int, reason: str, now: float) -> None:
        """Take the running test for hung because a server of its own has reached its deadline."""
        if self._test is None or key not in self._keys or self._stage is not Stage.WATCHED:
            return
        self._reason = self._reason or reason
        if self._is_held:
            self._left_s = 0.0
        else:
            self.deadline = now

    def hold(self, now: float, *, is_held: bool) -> None:
        """Let no time pass while a debugger is at work, and go on from there once it has ended."""
        if is_held and not self._is_held:
            self._left_s = None if self.deadline is None else max(0.0, self.deadline - now)
            self.deadline = None
        elif self._is_held and not is_held:
            self.deadline = None if self._left_s is None else now + self._left_s
        self._is_held = is_held

    def debugger_seen(self, now: float) -> None:
        """Begin again later, from the interrupt: a debugger is at work, and will not say when it ends."""
        is_due = self.deadline is not None and self.deadline <= now
        if self._stage is Stage.ENDED or not (is_due or self._stage is not Stage.WATCHED):
            return
        self._stage = Stage.WATCHED
        self._spared_s = 0.0
        if self._is_held:
            self._left_s = LOOK_AGAIN_S
        else:
            self.deadline = now + LOOK_AGAIN_S

    def interrupt_seen(self, now: float, *, is_debugging: bool) -> str:
        """Hear the answer to the interrupt, and give why the test is taken for hung ("": it is not, any more)."""
        if is_debugging or self._is_held:
            self.debugger_seen(now)
        elif self._stage is Stage.INTERRUPTED and self.deadline is not None:
            self._spared_s = self.deadline - now
            self.deadline = now
        return "" if self._stage is Stage.WATCHED else self._reason

    def due(self, now: float) -> list[Act]:
        """Give what must be done at this time."""
        acts: list[Act] = []
        while self._test is not None and self.deadline is not None and self.deadline <= now:
            self._stage = _FOLLOWING[self._stage]
            acts += self._acts(self._test)
            pause_s = self._pause_s(self._test.grace_s)
            self.deadline = None if pause_s is None else now + pause_s
        return acts

    def _acts(self, test: BeginTest) -> list[Act]:
        if self._stage is Stage.INTERRUPTED:
            self._reason = self._reason or f"its deadline of {test.deadline_s:g} s has passed"
            return [InterruptClient(test)]
        if self._stage is Stage.ENDED:
            text = f"{test.test}: {self._reason}, and it still runs {test.grace_s:g} s later: its process is ended"
            return [EndClient(test, text)]
        why = f"{test.test} hangs: {self._reason}"
        if self._stage is Stage.STRIPPED:
            return [StopServers(self._keys, why)]
        # It may hang somewhere else by now: its stacks are written once more.
        return [StopServers(None, why), InterruptClient(test)]

    def _pause_s(self, grace_s: float) -> float | None:
        answer_s = min(ANSWER_S, grace_s / 4)
        return {
            Stage.INTERRUPTED: answer_s,
            Stage.STRIPPED: grace_s / 2 - answer_s + self._spared_s,
            Stage.BARE: grace_s / 2,
        }.get(self._stage)
