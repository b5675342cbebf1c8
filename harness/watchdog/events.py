"""What the supervisor is told (events) and what it wants done (effects), as frozen types.

The loop makes the events and carries out the effects.
"""

from __future__ import annotations

from harness.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

    from harness.messages import Adopt, BeginTest, BrokerOrder, BrokerReport, Launch, Reply, Request, Survivor

# ---- events


class Requested(Record):
    """A request came over the Pipe."""

    request_id: int
    request: Request


class Started(Record):
    """A server's root executes its program."""

    key: int
    pid: int
    start_time: int
    keeper: int
    ports: dict[str, int]


class LaunchFailed(Record):
    """A server could not be started; nothing of it is left."""

    key: int
    message: str


class RootExited(Record):
    """A server's root has exited; `returncode` is None if another process reaped it."""

    key: int
    returncode: int | None


class TreeGone(Record):
    """No process of a server is left."""

    key: int


class KillSeen(Record):
    """A server's keeper has begun to kill."""

    key: int


class TreeStuck(Record):
    """Processes of a server did not end on SIGKILL."""

    key: int
    survivors: list[Survivor]


class KeeperLost(Record):
    """A server's keeper ended before its tree did."""

    key: int


class OrphansGone(Record):
    """No process that a lost keeper left behind is alive."""


class OrphansStuck(Record):
    """Processes that a lost keeper left behind did not end on SIGKILL."""

    survivors: list[Survivor]


class KeeperForked(Record):
    """The keeper of a server on a lease waits for the word to start the root."""

    key: int
    launch: Launch
    keeper: int
    start_time: int


class BrokerSaid(Record):
    """The broker reports on a lease or a tenant."""

    report: BrokerReport


class BrokerLost(Record):
    """The broker has ended, or cannot be started."""

    reason: str


class ClientGone(Record):
    """The test process has ended, closed the Pipe, or the watchdog was told to end."""

    reason: str


class DebuggerSeen(Record):
    """The test process was not interrupted: a debugger holds it (ptrace(2)), or its user has suspended it."""


class Tick(Record):
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
    | KeeperForked
    | BrokerSaid
    | BrokerLost
    | ClientGone
    | DebuggerSeen
    | Tick
)

# ---- effects


class Spawn(Record):
    """Fork a keeper that starts this server."""

    key: int
    launch: Launch


class Go(Record):
    """Have a keeper that waits start its root."""

    key: int


class TellBroker(Record):
    """Send this to the broker, which is started if there is none."""

    order: BrokerOrder


class EndBroker(Record):
    """End the broker, which does not answer."""


class Take(Record):
    """Begin to watch a process that the test process started."""

    key: int
    adopt: Adopt


class Ask(Record):
    """Ask these servers to exit: first the signal to all, then the rest of the work."""

    keys: list[int]


class Kill(Record):
    """Kill these servers' whole trees."""

    keys: list[int]


class Signal(Record):
    """Send a signal to a server's root."""

    key: int
    signal: int


class KillKeeper(Record):
    """End a keeper that does not answer: its tree is then re-parented to the watchdog."""

    key: int


class SweepOrphans(Record):
    """Ask, or kill, whatever lost keepers left to the watchdog; tell when none is left."""

    kill: bool


class Release(Record):
    """Give back what was held for a server that is gone (its ports)."""

    key: int


class Answer(Record):
    """Send a reply over the Pipe."""

    request_id: int
    reply: Reply


class InterruptClient(Record):
    """Make the test process write its stacks and look up, unless a debugger holds it."""

    test: BeginTest


class EndClient(Record):
    """End the test process, which hangs in this test; `text` says why."""

    test: BeginTest
    text: str


class Log(Record):
    """Write a line to the watchdog's log."""

    text: str


class Leave(Record):
    """End the watchdog process."""


Effect: TypeAlias = (
    Spawn
    | Go
    | TellBroker
    | EndBroker
    | Take
    | Ask
    | Kill
    | Signal
    | KillKeeper
    | SweepOrphans
    | Release
    | Answer
    | InterruptClient
    | EndClient
    | Log
    | Leave
)
