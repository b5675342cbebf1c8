"""What a stop reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness import signals
from harness.errors import GpuNotReleased, Leaked

if TYPE_CHECKING:
    from harness import lease_messages, messages


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
class GpuProcess:
    """A process that a device lists. `used_mib` is None where the driver does not tell."""

    pid: int
    used_mib: int | None
    command: str

    def __str__(self) -> str:
        """Describe the process in one line."""
        return f"pid {self.pid}, {'?' if self.used_mib is None else self.used_mib} MiB: {self.command or '?'}"


@dataclass(frozen=True)
class DeviceRelease:
    """Whether the memory of one device came back after a server.

    `verdict` is "freed", "held" or "unknown" (there was no reading to judge by), and `note` says what is not obvious.
    `baseline_mib` was in use before the lease, at most `peak_mib` during it (read every 0.25 s), and `now_mib` at the
    end; None is no reading. `own` are processes of the server that the device still lists, `foreign` those of others
    that came since. `waited_s` is the time since the stop began, `freed_at` the moment (`time.monotonic()`) of the
    reading that showed the memory free.
    """

    uuid: str
    index: int
    verdict: str
    baseline_mib: int | None
    peak_mib: int | None
    now_mib: int | None
    own: tuple[GpuProcess, ...] = ()
    foreign: tuple[GpuProcess, ...] = ()
    waited_s: float = 0.0
    freed_at: float | None = None
    note: str = ""

    def __str__(self) -> str:
        """Describe it in one line, and each process in one more."""
        text = f"GPU {self.index} ({self.uuid}): {self.verdict} after {self.waited_s:.3f} s, {_mib(self.now_mib)} now,"
        text += f" {_mib(self.baseline_mib)} before, {_mib(self.peak_mib)} at most" + (
            f"; {self.note}" * bool(self.note)
        )
        lines = [f"\n    of the server: {process}" for process in self.own]
        lines += [f"\n    of another, since: {process}" for process in self.foreign]
        return text + "".join(lines)


def _mib(value: int | None) -> str:
    return "? MiB" if value is None else f"{value} MiB"


@dataclass(frozen=True)
class ServerOutcome:
    """How one server ended.

    `how` is "exited" (by itself), "asked" (SIGTERM was enough), "killed" or "unkillable". `returncode` is the root's,
    in `subprocess.Popen`'s convention, or None if it is not known (an adopted server). `seconds` is the stop's length.
    `reason` says why the watchdog stopped it unasked (its deadline, or that of a hung test), "" if it did not.
    Of a launched server's survivors at most 50 are named. `gpu` says of each device that it had leased whether the
    memory came back. `exited_at` is when the watchdog saw the exit of its root (`time.monotonic()`), or, of one whose
    keeper was lost, the end of its tree; None for a root that could not be killed.
    """

    name: str
    pid: int
    how: str
    returncode: int | None
    seconds: float
    survivors: tuple[Survivor, ...] = ()
    reason: str = ""
    gpu: tuple[DeviceRelease, ...] = ()
    exited_at: float | None = None

    def __str__(self) -> str:
        """Describe the outcome in one line."""
        why = f", since {self.reason}" if self.reason else ""
        end = f"{self.how}, {signals.describe(self.returncode)}, {self.seconds:.3f} s"
        return f"{self.name!r} (pid {self.pid}): {end}{why}"


@dataclass(frozen=True)
class GpuRelease:
    """Whether the memory of all devices came back: a row for each device of each stopped server."""

    devices: tuple[DeviceRelease, ...]

    @property
    def verdict(self) -> str:
        """Give the worst verdict: "held" before "unknown" before "freed"."""
        verdicts = {device.verdict for device in self.devices}
        return next((verdict for verdict in ("held", "unknown") if verdict in verdicts), "freed")

    @property
    def is_freed(self) -> bool:
        """Say whether all memory is known to be back."""
        return self.verdict == "freed"


@dataclass(frozen=True)
class StopReport:
    """What stopping some servers in parallel did. `seconds` is the wall time of the whole stop."""

    outcomes: tuple[ServerOutcome, ...]
    seconds: float

    @property
    def gpu(self) -> GpuRelease | None:
        """Say what became of the memory of the servers' GPUs; None if none had leased any."""
        devices = tuple(device for outcome in self.outcomes for device in outcome.gpu)
        return GpuRelease(devices) if devices else None

    @property
    def survivors(self) -> tuple[Survivor, ...]:
        """Give the processes that could not be ended."""
        return tuple(survivor for outcome in self.outcomes for survivor in outcome.survivors)

    @property
    def is_clean(self) -> bool:
        """Say whether nothing survived, and no memory of a GPU is known to be held."""
        is_held = self.gpu is not None and self.gpu.verdict == "held"
        return not is_held and all(outcome.how != "unkillable" for outcome in self.outcomes)

    def raise_if_leaked(self) -> None:
        """Raise Leaked, naming every survivor, if there is one, or GpuNotReleased, naming who holds what."""
        if self.survivors or any(outcome.how == "unkillable" for outcome in self.outcomes):
            self._raise_survivors()
        held = [
            f"  {outcome.name!r}: {device}"
            for outcome in self.outcomes
            for device in outcome.gpu
            if device.verdict == "held"
        ]
        if held:
            raise GpuNotReleased("GPU memory of stopped servers did not come back:\n" + "\n".join(held))

    def _raise_survivors(self) -> None:
        lines = [str(outcome) for outcome in self.outcomes if outcome.how == "unkillable"]
        lines += [f"  {survivor}" for survivor in self.survivors]
        raise Leaked("processes survived SIGKILL:\n" + "\n".join(lines))


def outcome_of(wire: messages.Outcome) -> ServerOutcome:
    """Make the public outcome from the watchdog's."""
    survivors = tuple(Survivor(*survivor) for survivor in wire.survivors)
    end = (wire.how, wire.returncode, wire.seconds, survivors, wire.reason)
    return ServerOutcome(wire.name, wire.pid, *end, tuple(map(_release_of, wire.gpu)), wire.exited_at)


def outcome_facts(outcome: ServerOutcome) -> dict[str, object]:
    """Give what a report says of an outcome, as JSON can hold it."""
    return {
        "how": outcome.how,
        "returncode": outcome.returncode,
        "seconds": round(outcome.seconds, 6),
        "reason": outcome.reason,
        "survivors": [survivor.pid for survivor in outcome.survivors],
        "gpu": [
            {"uuid": device.uuid, "verdict": device.verdict, "seconds": round(device.waited_s, 6)}
            for device in outcome.gpu
        ],
    }


def _release_of(wire: lease_messages.DeviceRelease) -> DeviceRelease:
    own = tuple(GpuProcess(*process) for process in wire.own)
    foreign = tuple(GpuProcess(*process) for process in wire.foreign)
    return DeviceRelease(**{**wire.as_dict(), "own": own, "foreign": foreign})


def report_of(wire: messages.Stopped) -> StopReport:
    """Make the public report from the watchdog's."""
    return StopReport(tuple(outcome_of(outcome) for outcome in wire.outcomes), wire.seconds)
