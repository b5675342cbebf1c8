"""What the supervisor is told (events) and what it wants done (effects), as frozen types.

The loop makes the events and carries out the effects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from harness.messages import Adopt, Launch, Reply, Request, Survivor

# ---- events


class Requested(NamedTuple):
    """A request came over the Pipe."""

    request_id: int
    request: Request


class Started(NamedTuple):
    """A server's root executes its program."""

    key: int
    pid: int
    start_time: int
    keeper: int
    ports: dict[str, int]


class LaunchFailed(NamedTuple):
    """A server could not be started; nothing of it is left."""

    key: int
    message: str


class RootExited(NamedTuple):
    """A server's root has exited; `returncode` is None if another process reaped it."""

    key: int
    returncode: int | None


class TreeGone(NamedTuple):
    """No process of a server is left."""

    key: int


class KillSeen(NamedTuple):
    """A server's keeper has begun to kill."""

    key: int


class TreeStuck(NamedTuple):
    """Processes of a server did not end on SIGKILL."""

    key: int
    survivors: list[Survivor]


class KeeperLost(NamedTuple):
    """A server's keeper ended before its tree did."""

    key: int


class OrphansGone(NamedTuple):
    """No process that a lost keeper left behind is alive."""


class OrphansStuck(NamedTuple):
    """Processes that a lost keeper left behind did not end on SIGKILL."""

    survivors: list[Survivor]


class ClientGone(NamedTuple):
    """The test process has ended, closed the Pipe, or the watchdog was told to end."""

    reason: str


class Tick(NamedTuple):
    """A deadline has passed."""


Event: TypeAlias = (
    Requested
    | Started
    | LaunchFailed
    | RootExited
    | TreeGone
    | KillSeen
    | TreeStuck
    | KeeperLost
    | OrphansGone
    | OrphansStuck
    | ClientGone
    | Tick
)

# ---- effects


class Spawn(NamedTuple):
    """Fork a keeper that starts this server."""

    key: int
    launch: Launch


class Take(NamedTuple):
    """Begin to watch a process that the test process started."""

    key: int
    adopt: Adopt


class Ask(NamedTuple):
    """Ask these servers to exit: first the signal to all, then the rest of the work."""

    keys: list[int]


class Kill(NamedTuple):
    """Kill these servers' whole trees."""

    keys: list[int]


class Signal(NamedTuple):
    """Send a signal to a server's root."""

    key: int
    signal: int


class KillKeeper(NamedTuple):
    """End a keeper that does not answer: its tree is then re-parented to the watchdog."""

    key: int


class SweepOrphans(NamedTuple):
    """Ask, or kill, whatever lost keepers left to the watchdog; tell when none is left."""

    kill: bool


class Release(NamedTuple):
    """Give back what was held for a server that is gone (its ports)."""

    key: int


class Answer(NamedTuple):
    """Send a reply over the Pipe."""

    request_id: int
    reply: Reply


class Log(NamedTuple):
    """Write a line to the watchdog's log."""

    text: str


class Leave(NamedTuple):
    """End the watchdog process."""


Effect: TypeAlias = Spawn | Take | Ask | Kill | Signal | KillKeeper | SweepOrphans | Release | Answer | Log | Leave
