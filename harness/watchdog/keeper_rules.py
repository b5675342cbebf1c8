"""The rules of a keeper: `handle(event, now)` gives the effects that must follow. No I/O, no clock, no sleep.

While the watchdog lives it decides, and the keeper obeys. When it has died the keeper asks, waits and kills by itself.
Whatever happens the keeper ends only when the kernel says that it has no child left.
"""

from __future__ import annotations

from harness.messages import (
    AskOrder,
    KillBegun,
    KillOrder,
    Report,
    RootExit,
    RootFailed,
    RootStarted,
    TreeEmpty,
)
from harness.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

KILL_LIMIT_S = 5.0
# The pause between two sweeps that change nothing: at first short, since a killed process is mostly gone in 1 ms.
FIRST_PAUSE_S = 0.001
LONGEST_PAUSE_S = 0.25
# What SIGKILL to the groups at the top has not ended by then is swept. Where hundreds of servers are killed at once,
# exiting takes so long, and sweeping trees that are about to be gone would make it longer.
TOP_PAUSE_S = 0.05


# ---- events


class Ordered(Record):
    """The watchdog gave an order."""

    order: AskOrder | KillOrder


class RootUp(Record):
    """The root has executed its program."""

    pid: int


class RootDown(Record):
    """The root could not execute its program."""

    message: str


class Reaped(Record):
    """Children were reaped. `returncode` is the root's if it was among them; `is_empty`: the kernel says ECHILD.

    `is_new` says that a child is there, an orphan, that had not been sent SIGKILL when the killing began.
    """

    returncode: int | None
    is_empty: bool
    is_new: bool


class WatchdogGone(Record):
    """The watchdog has died."""


class Swept(Record):
    """One sweep is done; `is_new` says that it met a process that had not been sent SIGKILL before."""

    is_new: bool
    alive: int


class Tick(Record):
    """The deadline has passed."""


Event: TypeAlias = Ordered | RootUp | RootDown | Reaped | WatchdogGone | Swept | Tick


# ---- effects


class AskRoot(Record):
    """Send SIGTERM to the root, or to its process group where the launch said so."""


class AskTop(Record):
    """Send SIGTERM to each process at the top of what the root left, once."""


class KillTop(Record):
    """Send SIGKILL to every child and its process group, which is the whole of a plain tree."""


class Sweep(Record):
    """Send SIGKILL to every process of the tree that is there now."""


class Tell(Record):
    """Send a report to the watchdog."""

    report: Report


class TellUnkilled(Record):
    """Report every process of the tree that is still alive."""


class Leave(Record):
    """End the keeper."""


Effect: TypeAlias = AskRoot | AskTop | KillTop | Sweep | Tell | TellUnkilled | Leave


class KeeperRules:
    """The state of one keeper, and its rules."""

    def __init__(self, *, crash_grace_s: float) -> None:
        """Take the grace, in seconds, that is given when the watchdog has died."""
        self._crash_grace_s = crash_grace_s
        self._root_is_up = False
        self._root_is_gone = False
        self._is_asking = False
        self._root_is_asked = False
        self._is_killing = False
        self._kill_limit: float | None = None
        self._pause_s = FIRST_PAUSE_S
        self._failure: str | None = None
        self.deadline: float | None = None

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take an event at the monotonic time `now`, and give the effects that must follow, in order."""
        if isinstance(event, Ordered):
            effects = self._on_order(event.order, now)
        elif isinstance(event, RootUp):
            effects = self._on_root_up(event)
        elif isinstance(event, RootDown):
            self._failure = event.message
            effects = []
        elif isinstance(event, Reaped):
            effects = self._on_reaped(event)
        elif isinstance(event, WatchdogGone):
            effects = self._on_watchdog_gone(now)
        elif isinstance(event, Swept):
            effects = self._on_swept(event, now)
        else:
            effects = self._on_tick(now)
        return effects

    def _on_order(self, order: AskOrder | KillOrder, now: float) -> list[Effect]:
        if isinstance(order, KillOrder):
            return [Tell(KillBegun()), *self._kill(now)]
        self._root_is_asked = self._root_is_asked or order.root_asked
        return self._ask()

    def _on_root_up(self, event: RootUp) -> list[Effect]:
        self._root_is_up = True
        told: list[Effect] = [Tell(RootStarted(event.pid))]
        return told + (self._ask() if self._is_asking else [])

    def _ask(self) -> list[Effect]:
        self._is_asking = True
        if self._is_killing:
            return []
        if self._root_is_gone:
            return [AskTop()]
        if not self._root_is_up or self._root_is_asked:
            return []
        self._root_is_asked = True
        return [AskRoot()]

    def _on_reaped(self, event: Reaped) -> list[Effect]:
        effects: list[Effect] = []
        if event.returncode is not None:
            self._root_is_gone = True
            if self._failure is None:
                effects.append(Tell(RootExit(event.returncode)))
        if event.is_empty:
            return [*effects, Tell(TreeEmpty() if self._failure is None else RootFailed(self._failure)), Leave()]
        if self._is_killing:
            # A struck process forks no more, so only what had another parent before can be new.
            return [*effects, Sweep()] if event.is_new else effects
        if self._is_asking and self._root_is_gone:
            effects.append(AskTop())
        return effects

    def _on_watchdog_gone(self, now: float) -> list[Effect]:
        if self._is_killing:
            return []
        limit = now + self._crash_grace_s
        self.deadline = limit if self.deadline is None else min(self.deadline, limit)
        return self._ask()

    def _on_tick(self, now: float) -> list[Effect]:
        self.deadline = None
        return [Sweep()] if self._is_killing else self._kill(now)

    def _kill(self, now: float) -> list[Effect]:
        self._is_killing = True
        if self._kill_limit is None:
            self._kill_limit = now + KILL_LIMIT_S
        self.deadline = now + TOP_PAUSE_S
        return [KillTop()]

    def _on_swept(self, event: Swept, now: float) -> list[Effect]:
        if event.is_new:
            self._pause_s = FIRST_PAUSE_S
        self.deadline = now + self._pause_s
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
        if self._kill_limit is not None and now >= self._kill_limit and event.alive:
            self._kill_limit = None
            return [TellUnkilled()]
        return []
