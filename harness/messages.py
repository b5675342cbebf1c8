"""The messages between the client, the watchdog and its keepers, as frozen types, and their form on the wire.

On the wire a message is JSON, `["Launch", {...}]`: decoding it runs no code. Names and texts that are not UTF-8 travel
as lone surrogates, as `os.fsdecode` made them. Seconds are floats; a server is known by its `key`, the
id of the request that launched it.
"""

from __future__ import annotations

import json
import marshal

from harness.fields import checked
from harness.lease_messages import (
    ClientGoneOrder,
    DeviceRelease,
    EndLease,
    EndLeaseOrder,
    GpuProcess,
    Lease,
    LeaseOrder,
    LeaseStatus,
    Released,
    TenantAsked,
    TenantGone,
    TenantOrder,
    TenantRecorded,
    TenantStarted,
    WaitLease,
)
from harness.records import Record, Sealed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias


class MessageError(ValueError):
    """The peer sent something that is no message of this version."""


# ---- requests: the client asks, the watchdog replies to each exactly once


class Launch(Record):
    """Start a server. `templated` names the entries of `environment` in which tokens are replaced.

    `port` is its main port, on `host` ("": on all addresses), None for one of the watchdog's choice; `is_literal`
    leaves tokens in `command` alone. On a `lease` its program is not executed before the store of leases names it, with
    its `devices` (UUIDs).
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    templated: list[str]
    cwd: str
    ports: list[str]
    log_path: str
    log_dir: str
    ask: str
    grace_s: float
    deadline_s: float | None
    lease: int | None
    devices: list[str]
    port: int | None
    host: str
    is_literal: bool

    def __repr__(self) -> str:
        """Show no environment: it holds tokens, and tracebacks show arguments."""
        return f"Launch(name={self.name!r}, command={self.command!r}, cwd={self.cwd!r})"


class Adopt(Record):
    """Own a process that the test process started itself. `start_time` is field 22 of its /proc/PID/stat."""

    name: str
    pid: int
    start_time: int
    grace_s: float


class Stop(Record):
    """Stop servers in parallel; `kill` skips the asking. The reply comes when all are gone."""

    keys: list[int]
    grace_s: float | None
    kill: bool


class SendSignal(Record):
    """Send a signal to the server's root."""

    key: int
    signal: int


class Wait(Record):
    """Reply once the root has exited (`until="exit"`) or the whole tree is gone (`"gone"`), or after `timeout_s`."""

    key: int
    until: str
    timeout_s: float


class Status(Record):
    """Reply with the server's status at once."""

    key: int


class Close(Record):
    """Stop everything, reply, and end the watchdog."""


class BeginTest(Record):
    """A test begins. After `deadline_s` (None: only after that of a server of its own) it is taken for hung.

    `signal` makes the test process write its stacks to the file `stacks` and look up; `grace_s` later it is ended, and
    why is written to the file `report` and to the test process's file descriptor `stderr` (-1: it has none).
    """

    test: str
    deadline_s: float | None
    grace_s: float
    signal: int
    stacks: str
    report: str
    stderr: int


class HoldTest(Record):
    """A debugger has begun its work in the test (`is_held`) or has ended it: meanwhile no deadline passes."""

    is_held: bool


class InterruptSeen(Record):
    """The test process runs Python code since the signal; `is_debugging`: a debugger is at work in it."""

    is_debugging: bool


class EndTest(Record):
    """The test has ended, with its teardown."""


# ---- replies


class Launched(Record):
    """The server's root exists."""

    key: int
    pid: int
    start_time: int
    keeper: int
    ports: dict[str, int]


class Failed(Record):
    """The request failed; `error` is the name of an error class."""

    error: str
    message: str


class Survivor(Record):
    """A process that SIGKILL did not end: its state letter and wait channel are those of proc(5)."""

    pid: int
    state: str
    wait_channel: str
    command: str


class Outcome(Record):
    """How one server ended. `how` is exited, asked, killed or unkillable; `returncode` is Popen's, None if unknown.

    `reason` and `exited_at` are as in `ServerStatus`; `gpu` has a row for each device of its lease.
    """

    key: int
    name: str
    pid: int
    how: str
    returncode: int | None
    seconds: float
    survivors: list[Survivor]
    reason: str
    gpu: list[DeviceRelease]
    exited_at: float | None


class Stopped(Record):
    """All servers of a Stop or Close are gone, or have been given up as unkillable."""

    outcomes: list[Outcome]
    seconds: float


class ServerStatus(Record):
    """What the watchdog knows of a server now. `root_exited` says whether `returncode` is final.

    `exited_at` is when the watchdog saw the root's exit, or its tree's end if that was all that it saw, by
    CLOCK_MONOTONIC, which all processes share; None as long as it has seen neither.
    `reason` says why the watchdog has stopped it unasked, "" if it has not.
    """

    key: int
    phase: str
    root_exited: bool
    returncode: int | None
    exited_at: float | None
    reason: str


class Overdue(Record):
    """Why the running test is taken for hung; "" if it is not."""

    reason: str


class Done(Record):
    """The request was carried out."""


# ---- between the watchdog and a keeper


class AskOrder(Record):
    """Stop politely; `root_asked` says that the watchdog has sent SIGTERM to the root already."""

    root_asked: bool


class GoOrder(Record):
    """Start the root of a server on a lease."""


class KillOrder(Record):
    """Kill the whole tree now."""


class RootStarted(Record):
    """The root has executed its program. A pidfd on it comes with this message (SCM_RIGHTS, unix(7))."""

    pid: int


class RootFailed(Record):
    """The root could not execute its program, with the reason in words."""

    message: str


class KillBegun(Record):
    """The keeper has read the order to kill: it is not hung."""


class RootExit(Record):
    """The root has been reaped."""

    returncode: int


class TreeEmpty(Record):
    """The kernel says that the keeper has no child left."""


class Unkilled(Record):
    """These processes were sent SIGKILL and are still there after the time given to them."""

    survivors: list[Survivor]


Request: TypeAlias = (
    Launch
    | Adopt
    | Stop
    | SendSignal
    | Wait
    | Status
    | Close
    | BeginTest
    | HoldTest
    | InterruptSeen
    | EndTest
    | Lease
    | WaitLease
    | EndLease
)
Reply: TypeAlias = Launched | Failed | Stopped | ServerStatus | Overdue | Done | LeaseStatus
Order: TypeAlias = AskOrder | GoOrder | KillOrder
BrokerOrder: TypeAlias = (
    LeaseOrder | EndLeaseOrder | TenantOrder | TenantStarted | TenantAsked | TenantGone | ClientGoneOrder
)
BrokerReport: TypeAlias = LeaseStatus | TenantRecorded | Released
Report: TypeAlias = RootStarted | RootFailed | KillBegun | RootExit | TreeEmpty | Unkilled
Message: TypeAlias = Request | Reply | Order | Report | BrokerOrder | BrokerReport

_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (
        *(Launch, Adopt, Stop, SendSignal, Wait, Status, Close),
        *(BeginTest, HoldTest, InterruptSeen, EndTest),
        *(Lease, WaitLease, EndLease),
        *(Launched, Failed, Stopped, ServerStatus, Overdue, Done, LeaseStatus),
        *(AskOrder, GoOrder, KillOrder),
        *(RootStarted, RootFailed, KillBegun, RootExit, TreeEmpty, Unkilled),
        *(LeaseOrder, EndLeaseOrder, TenantOrder, TenantStarted, TenantAsked, TenantGone, ClientGoneOrder),
        *(TenantRecorded, Released),
    )
}


def encode(message: Message) -> Sealed:
    """Give the message's form on the wire."""
    try:
        return Sealed(json.dumps([type(message).__name__, message.as_dict()], default=list).encode())
    except BaseException as error:  # noqa: BLE001 - it is raised again, without the frames that hold the message
        raise error.with_traceback(None) from None


def decode(data: bytes) -> Message:
    """Read a message; raises MessageError for anything else, a field of another type included."""
    try:
        name, fields = json.loads(data)
        return _with_nested(checked(_KINDS[name](**fields)))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise MessageError(f"not a message: {type(error).__name__}") from None


def pack(message: Order | Report | BrokerOrder | BrokerReport) -> bytes:
    """Give the form between a watchdog and its keepers and broker: JSON would cost every keeper 0.2 MiB."""
    return marshal.dumps((type(message).__name__, [_plain(value) for value in message]))


def unpack(data: bytes) -> Message:
    """Read what `pack` made."""
    name, values = marshal.loads(data)  # noqa: S302 - it comes from a process that was forked from this one
    return _with_nested(_KINDS[name](*values))


def _plain(value: object) -> object:
    if isinstance(value, Record):
        return [_plain(part) for part in value]
    return [_plain(part) for part in value] if isinstance(value, list) else value


def _with_nested(message: Message) -> Message:
    if isinstance(message, Stopped):
        outcomes = [checked(Outcome(*fields)) for fields in message.outcomes]
        return message.replaced(
            outcomes=[o.replaced(survivors=_survivors(o.survivors), gpu=_releases(o.gpu)) for o in outcomes]
        )
    if isinstance(message, Unkilled):
        return Unkilled(_survivors(message.survivors))
    if isinstance(message, Released):
        return message.replaced(devices=_releases(message.devices))
    if isinstance(message, LeaseOrder):
        return message.replaced(request=checked(Lease(*message.request)))
    return message


def _survivors(rows: list[Survivor]) -> list[Survivor]:
    return [checked(Survivor(*row)) for row in rows]


def _releases(rows: list[DeviceRelease]) -> list[DeviceRelease]:
    releases = [checked(DeviceRelease(*row)) for row in rows]
    return [release.replaced(own=_processes(release.own), foreign=_processes(release.foreign)) for release in releases]


def _processes(rows: list[GpuProcess]) -> list[GpuProcess]:
    return [checked(GpuProcess(*row)) for row in rows]
