"""Checks what a user asks for, before anything is started. Pure but for looking at the working directory."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from harness import templates
from harness.errors import SpecError

if TYPE_CHECKING:
    from harness.journal import Owner
    from harness.server import Server

StrPath: TypeAlias = "str | os.PathLike[str]"
Ready: TypeAlias = "Callable[[Server], bool] | None"
_Value = TypeVar("_Value", str, "str | None")
_Checked = TypeVar("_Checked")
_Result = TypeVar("_Result")
DEFAULT_GRACE_S = 15.0
DEFAULT_READY_TIMEOUT_S = 480.0
# More than a year is a mistake, and more than some clocks and poll(2) can count.
LONGEST_S = 366 * 86400.0


@dataclass(frozen=True)
class GpuWish:
    """Devices that are wanted: `count` of any, or these `devices` (UUIDs, or numbers among the visible ones).

    `memory_mib` is the share of each that is enough, None for whole devices. `named_in` is an environment that names
    the devices itself: all that it makes visible are wanted, whatever `count` says, and it is left as it is.
    """

    count: int
    devices: tuple[str, ...] = ()
    memory_mib: int | None = None
    named_in: Mapping[str, str] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ServerSpec:
    """A server as it was asked for, checked.

    `port` is its main port, on `host` ("": on all addresses), and `is_literal` leaves its command as it is.
    """

    name: str | None
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    templated: tuple[str, ...] = ()
    cwd: str = ""
    ready: Ready = None
    ready_timeout_s: float = DEFAULT_READY_TIMEOUT_S
    grace_s: float = DEFAULT_GRACE_S
    ask: str = "root"
    ports: tuple[str, ...] = ()
    deadline_s: float | None = None
    gpus: GpuWish | None = None
    owner: Owner | None = None
    port: int | None = None
    host: str = ""
    is_literal: bool = False


class Environment(dict[str, _Value]):
    """Environment variables that do not show their values: some tracebacks show locals, and these hold tokens."""

    def __repr__(self) -> str:
        """Say how many they are."""
        return f"<{len(self)} variables>"


class Arguments(list[str]):
    """Arguments of a program that do not show their values, as `Environment`: some are keys."""

    def __repr__(self) -> str:
        """Say how many they are."""
        return f"<{len(self)} arguments>"


def text(value: object, what: str, *, may_be_empty: bool = False) -> str:
    """Check a text that is to reach execve: a string without NUL."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise SpecError(f"{what} must be a string, not {type(value).__name__}")
    if "\0" in value:
        raise SpecError(f"{what} holds a NUL byte")
    if not value and not may_be_empty:
        raise SpecError(f"{what} is empty")
    return value


def seconds(value: object, what: str) -> float:
    """Check a time: a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SpecError(f"{what} must be a number of seconds, not {type(value).__name__}")
    if not 0 < value <= LONGEST_S:
        raise SpecError(f"{what} must be more than 0 seconds and at most {LONGEST_S:.0f}, not {value}")
    return float(value)


def optional_seconds(value: object, what: str) -> float | None:
    """Check a time that may be None."""
    return None if value is None else seconds(value, what)


def name(value: object) -> str:
    """Check a server's or group's name."""
    return text(value, "a name")


def optional_name(value: object) -> str | None:
    """Check a name that may be None."""
    return None if value is None else name(value)


def command(value: object) -> list[str]:
    """Check a command: a non-empty list or tuple of strings or paths."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise SpecError(f"the command must be a list of strings, not {type(value).__name__}")
    if not value:
        raise SpecError("the command is empty")
    return [text(value[0], "the program"), *arguments(value[1:], "the command")]


def arguments(value: object, whose: str) -> Arguments:
    """Check what follows a program: a list or tuple of strings or paths."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise SpecError(f"the arguments of {whose} must be a list of strings, not {type(value).__name__}")
    return Arguments(text(part, f"argument {at} of {whose}", may_be_empty=True) for at, part in enumerate(value, 1))


def ports(value: object) -> tuple[str, ...]:
    """Check the names of the ports beside the main one."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise SpecError("ports must be a list of names")
    names = tuple(text(port, "a port's name") for port in value)
    bad = [port for port in names if set(port) & set("{}:")]
    if bad:
        raise SpecError(f"a port's name must not hold braces or colons: {bad[0]!r}")
    if len(set(names)) != len(names):
        raise SpecError(f"a port's name is there twice: {', '.join(names)}")
    return names


def ask(value: object) -> str:
    """Check how a server is asked to exit."""
    if value not in ("root", "group"):
        raise SpecError(f'ask must be "root" or "group", not {value!r}')
    return str(value)


def ready(value: object) -> Ready:
    """Check a readiness check: a callable or None. No async function: what it returns is true, and nobody awaits it."""
    if value is not None and not callable(value):
        raise SpecError(f"ready must be a callable, such as harness.http_ok(), not {type(value).__name__}")
    if inspect.iscoroutinefunction(value):
        raise SpecError(
            "ready must be a plain function, not an async one: it is called in a thread without an event loop"
        )
    return value


def sealed(changes: Mapping[str, _Value] | None) -> Mapping[str, _Value] | None:
    """Give the same changes of an environment, but so that they do not show their values."""
    # A dict first: looking at an abstract class is Python code, through which an interrupt would show `changes`.
    return Environment(changes) if isinstance(changes, (dict, Mapping)) else changes


def without_locals(check: Callable[[_Checked], _Result]) -> Callable[[_Checked], _Result]:
    """Let no traceback pass through this check's frames: pytest's --showlocals would print the value they look at."""

    @functools.wraps(check)
    def run(checked: _Checked) -> _Result:
        try:
            return check(checked)
        except BaseException as error:  # noqa: BLE001 - it is raised again
            raise error.with_traceback(None) from None

    return run


@without_locals
def environment(changes: object) -> Environment[str]:
    """Give `os.environ` as it is now with `changes` over it; None removes a name."""
    if changes is not None and not isinstance(changes, Mapping):
        raise SpecError(f"env must be a mapping, not {type(changes).__name__}")
    merged: Environment[str] = Environment(os.environ)
    for key, value in (changes or {}).items():
        variable = text(key, "a name in env")
        if "=" in variable:
            raise SpecError(f"a name in env holds '=': {variable!r}")
        if value is None:
            merged.pop(variable, None)
        else:
            merged[variable] = text(value, f"the value of {variable!r} in env", may_be_empty=True)
    return merged


def templated(changes: Mapping[str, str | None] | None) -> tuple[str, ...]:
    """Give the names of the variables in whose values tokens are replaced."""
    return tuple(key for key in changes or {} if (changes or {})[key] is not None)


def working_directory(value: StrPath | None) -> str:
    """Give the absolute working directory; it must exist."""
    try:
        directory = os.path.abspath(text(value, "cwd")) if value is not None else os.getcwd()
    except FileNotFoundError:
        raise SpecError("the working directory of this process does not exist any more: give cwd") from None
    if not os.path.isdir(directory):
        raise SpecError(f"cwd {directory!r} does not exist or is not a directory")
    return directory


@without_locals
def check_tokens(spec: ServerSpec) -> ServerSpec:
    """Give it back; raise SpecError for a `{port:NAME}` whose name is not among the server's ports."""
    for checked in (*spec.command, *(spec.environment[key] for key in spec.templated)):
        for unknown in templates.unknown_ports(checked, spec.ports):
            raise SpecError(f"{{port:{unknown}}} is not among ports={list(spec.ports)}")
    return spec


def gpus(value: object, memory_mib: object = None, changes: Mapping[str, str | None] | None = None) -> GpuWish | None:
    """Check which GPUs are wanted: a number of them, or a list of UUIDs and indexes; with a share alone, one."""
    share = _share(memory_mib)
    if value is None and share is None:
        return None
    check_devices_are_not_named(changes)
    return GpuWish(1, (), share) if value is None else _wish(value, share)


def _wish(value: object, share: int | None) -> GpuWish:
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise SpecError(f"gpus must be at least 1, or None for none, not {value}")
        return GpuWish(value, (), share)
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise SpecError(f"gpus must be a number or a list of UUIDs and indexes, not {type(value).__name__}")
    devices = tuple(_device(device) for device in value)
    if not devices:
        raise SpecError("gpus is an empty list: give None for no GPU")
    if len(set(devices)) != len(devices):
        raise SpecError(f"gpus: a device is there twice: {', '.join(devices)}")
    return GpuWish(len(devices), devices, share)


def _device(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return str(value)
    if isinstance(value, str) and value.startswith(("GPU-", "MIG-")):
        return value
    raise SpecError(f"gpus: a device is an index or a UUID that begins with GPU- or MIG-, not {value!r}")


def _share(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 40:
        raise SpecError(f"gpu_memory_mib must be a whole number of MiB above 0, not {value!r}")
    return value


def with_devices(environment: Mapping[str, str], devices: Iterable[str]) -> Environment[str]:
    """Give an environment in which CUDA sees exactly these devices (UUIDs), in this order."""
    return Environment({**environment, "CUDA_VISIBLE_DEVICES": ",".join(devices), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})


def environment_on(spec: ServerSpec, devices: Iterable[str]) -> dict[str, str]:
    """Give a server's environment on these devices."""
    is_named = spec.gpus is not None and spec.gpus.named_in is not None
    chosen = () if is_named else tuple(devices)
    return with_devices(spec.environment, chosen) if chosen else spec.environment


def check_devices_are_not_named(changes: Mapping[str, str | None] | None) -> None:
    """Raise SpecError if env names devices while a lease is to choose them."""
    if "CUDA_VISIBLE_DEVICES" in (changes or {}):
        raise SpecError("env must not set CUDA_VISIBLE_DEVICES together with gpus= or gpu_memory_mib=: the lease does")
