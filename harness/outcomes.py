"""What a stop reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness import signals
from harness.errors import Leaked

if TYPE_CHECKING:
    from harness import messages


@dataclass(frozen=True)
class Survivor:
    """A process that SIGKILL did not end in 5 s. `state` and `wait_channel` are those of proc(5) ("D": disk sleep)."""

    pid: int
    state: str
    wait_channel: str
    command: str

    def __str__(self) -> str:
        """Describe the process in one line."""
        return f"pid {self.pid} in state {self.state} at {self.wait_channel or '?'}: {self.command or '?'}"


@dataclass(frozen=True)
class ServerOutcome:
    """How one server ended.

    `how` is "exited" (by itself), "asked" (SIGTERM was enough), "killed" or "unkillable". `returncode` is the root's,
    in `subprocess.Popen`'s convention, or None if it is not known (an adopted server). `seconds` is the stop's length.
    `reason` says why the watchdog stopped it unasked (its deadline, or that of a hung test), "" if it did not.
    Of a launched server's survivors at most 50 are named.
    """

    name: str
    pid: int
    how: str
    returncode: int | None
    seconds: float
    survivors: tuple[Survivor, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        """Describe the outcome in one line."""
        why = f", since {self.reason}" if self.reason else ""
        end = f"{self.how}, {signals.describe(self.returncode)}, {self.seconds:.3f} s"
        return f"{self.name!r} (pid {self.pid}): {end}{why}"


@dataclass(frozen=True)
class GpuRelease:
    """Whether the devices were given back; not measured yet in this version."""


@dataclass(frozen=True)
class StopReport:
    """What stopping some servers in parallel did. `seconds` is the wall time of the whole stop."""

    outcomes: tuple[ServerOutcome, ...]
    seconds: float
    gpu: GpuRelease | None = None

    @property
    def survivors(self) -> tuple[Survivor, ...]:
        """Give the processes that could not be ended."""
        return tuple(survivor for outcome in self.outcomes for survivor in outcome.survivors)

    @property
    def is_clean(self) -> bool:
        """Say whether nothing survived."""
        return all(outcome.how != "unkillable" for outcome in self.outcomes)

    def raise_if_leaked(self) -> None:
        """Raise Leaked, naming every survivor, if there is one."""
        if self.is_clean:
            return
        lines = [str(outcome) for outcome in self.outcomes if outcome.how == "unkillable"]
        lines += [f"  {survivor}" for survivor in self.survivors]
        raise Leaked("processes survived SIGKILL:\n" + "\n".join(lines))


def outcome_of(wire: messages.Outcome) -> ServerOutcome:
    """Make the public outcome from the watchdog's."""
    survivors = tuple(Survivor(*survivor) for survivor in wire.survivors)
    return ServerOutcome(wire.name, wire.pid, wire.how, wire.returncode, wire.seconds, survivors, wire.reason)


def report_of(wire: messages.Stopped) -> StopReport:
    """Make the public report from the watchdog's."""
    return StopReport(tuple(outcome_of(outcome) for outcome in wire.outcomes), wire.seconds)
