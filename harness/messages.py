"""The messages between the client, the watchdog and its keepers, as frozen types, and their form on the wire.

On the wire a message is JSON, `["Launch", {...}]`: decoding it runs no code. Names and texts that are not UTF-8 travel
as lone surrogates, as `os.fsdecode` made them. Seconds are floats; a server is known by its `key`, the
id of the request that launched it.
"""

from __future__ import annotations

import json
import marshal

from harness.records import Record, Sealed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias, TypeVar

    _Kind = TypeVar("_Kind", bound=Record)


class MessageError(ValueError):
    """The peer sent something that is no message of this version."""


# ---- requests: the client asks, the watchdog replies to each exactly once


class Launch(Record):
    """Start a server. `templated` names the entries of `environment` in which tokens are replaced."""

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

    `reason` is as in `ServerStatus`.
    """

    key: int
    name: str
    pid: int
    how: str
    returncode: int | None
    seconds: float
    survivors: list[Survivor]
    reason: str


class Stopped(Record):
    """All servers of a Stop or Close are gone, or have been given up as unkillable."""

    outcomes: list[Outcome]
    seconds: float


class ServerStatus(Record):
    """What the watchdog knows of a server now. `root_exited` says whether `returncode` is final.

    `reason` says why the watchdog has stopped it unasked, "" if it has not.
    """

    key: int
    phase: str
    root_exited: bool
    returncode: int | None
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
    Launch | Adopt | Stop | SendSignal | Wait | Status | Close | BeginTest | HoldTest | InterruptSeen | EndTest
)
Reply: TypeAlias = Launched | Failed | Stopped | ServerStatus | Overdue | Done
Order: TypeAlias = AskOrder | KillOrder
Report: TypeAlias = RootStarted | RootFailed | KillBegun | RootExit | TreeEmpty | Unkilled
Message: TypeAlias = Request | Reply | Order | Report

_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (
        *(Launch, Adopt, Stop, SendSignal, Wait, Status, Close),
        *(BeginTest, HoldTest, InterruptSeen, EndTest),
        *(Launched, Failed, Stopped, ServerStatus, Overdue, Done),
        *(AskOrder, KillOrder),
        *(RootStarted, RootFailed, KillBegun, RootExit, TreeEmpty, Unkilled),
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
        return _with_nested(_checked(_KINDS[name](**fields)))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise MessageError(f"not a message: {type(error).__name__}") from None


def pack(message: Order | Report) -> bytes:
    """Give the form between a watchdog and the keeper that it forked: JSON would cost every keeper 0.2 MiB."""
    return marshal.dumps((type(message).__name__, [_plain(value) for value in message]))


def unpack(data: bytes) -> Message:
    """Read what `pack` made."""
    name, values = marshal.loads(data)  # noqa: S302 - it comes from a process that was forked from this one
    return _with_nested(_KINDS[name](*values))


def _plain(value: object) -> object:
    return [list(survivor) for survivor in value] if isinstance(value, list) else value


def _with_nested(message: Message) -> Message:
    if isinstance(message, Stopped):
        outcomes = [_checked(Outcome(*fields)) for fields in message.outcomes]
        return message.replaced(outcomes=[o.replaced(survivors=_survivors(o.survivors)) for o in outcomes])
    if isinstance(message, Unkilled):
        return Unkilled(_survivors(message.survivors))
    return message


def _survivors(rows: list[Survivor]) -> list[Survivor]:
    return [_checked(Survivor(*row)) for row in rows]


# ---- what a field may hold

# No number, size or time (in seconds) is as large as that.
_NO_NUMBER = 1 << 64


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _NO_NUMBER


def _is_time(value: object) -> bool:
    # NaN, and what a sum of times cannot be, would make a deadline that never passes.
    return _is_int(value) or (isinstance(value, float) and abs(value) < _NO_NUMBER)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_list_of(is_item: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(is_item, value))


def _is_map_to(is_item: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_item, value.values()))


# By the text of the field's annotation: typing is not imported in the watchdog. Names in JSON objects are texts.
_IS: dict[str, Callable[[object], bool]] = {
    "int": _is_int,
    "float": _is_time,
    "str": _is_text,
    "bool": lambda value: isinstance(value, bool),
    "int | None": lambda value: value is None or _is_int(value),
    "float | None": lambda value: value is None or _is_time(value),
    "list[int]": _is_list_of(_is_int),
    "list[str]": _is_list_of(_is_text),
    "list[Survivor]": _is_list_of(lambda value: isinstance(value, list)),
    "list[Outcome]": _is_list_of(lambda value: isinstance(value, list)),
    "dict[str, int]": _is_map_to(_is_int),
    "dict[str, str]": _is_map_to(_is_text),
}


def _checked(record: _Kind) -> _Kind:
    for field, kind in type(record).__annotations__.items():
        if not _IS[kind](getattr(record, field)):
            raise TypeError(field)
    return record
