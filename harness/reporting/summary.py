"""What the events of a run amount to: the summary at its end, JUnit's properties, `python -m harness report`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from harness import signals

if TYPE_CHECKING:
    from collections.abc import Iterable

    from harness.reporting.events import Fields

_HOWS = ("asked", "killed", "exited", "unkillable")
_MOST_SLOWEST = 3
_IN_WORDS = {
    "asked": "ended when asked",
    "killed": "killed",
    "exited": "ended by itself",
    "unkillable": "COULD NOT BE KILLED",
}


@dataclass(frozen=True)
class Timed:
    """A server's start (launch to ready) or stop, in seconds, and the test in which it was."""

    server: str
    test: str
    seconds: float

    def __str__(self) -> str:
        """Say it in a few words."""
        return f"{self.seconds:.2f} s ({self.server!r})"


@dataclass
class Summary:
    """Numbers of a run. Times are in seconds, `leases` how long each lease of GPUs was waited for.

    `unknown` servers were not seen to end: their test process died, or left them to its watchdog.
    """

    launched: int = 0
    ended: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_HOWS, 0))
    died: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    starts: list[Timed] = field(default_factory=list)
    stops: list[Timed] = field(default_factory=list)
    one_by_one_s: float = 0.0
    parallel_s: float = 0.0
    leaks: list[str] = field(default_factory=list)
    leases: list[float] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        """Say whether every server was seen to end, none died or could not be killed, and nothing leaked."""
        return not (self.died or self.unknown or self.leaks or self.ended["unkillable"])

    @property
    def saved_s(self) -> float:
        """Give what stopping servers in parallel saved against one after another."""
        return max(0.0, self.one_by_one_s - self.parallel_s)

    def numbers(self) -> dict[str, int | float]:
        """Give the numbers, as JUnit's properties name them."""
        return {
            "harness.launched": self.launched,
            **{f"harness.{how}": count for how, count in self.ended.items()},
            "harness.died": len(self.died),
            "harness.unknown": len(self.unknown),
            "harness.leaks": len(self.leaks),
            "harness.slowest_start_s": self.starts[0].seconds if self.starts else 0.0,
            "harness.slowest_stop_s": self.stops[0].seconds if self.stops else 0.0,
            "harness.parallel_stop_saved_s": round(self.saved_s, 6),
            "harness.gpu_leases": len(self.leases),
            "harness.gpu_wait_s": round(sum(self.leases), 6),
        }

    def as_event(self) -> Fields:
        """Give the summary as the last line of a report."""
        return {"event": "summary", **asdict(self), "saved_s": round(self.saved_s, 6), "is_well": self.is_well}

    def line(self) -> str:
        """Say it in one line."""
        parts = [f"{_servers(self.launched)} launched: {self._ends()}"]
        parts += [f"slowest start {self.starts[0]}"] if self.starts else []
        parts += [f"slowest stop {self.stops[0]}"] if self.stops else []
        parts += [f"parallel stops saved {self.saved_s:.2f} s"] if self.one_by_one_s else []
        parts += [self._gpus()] if self.leases else []
        return "; ".join(parts)

    def lines(self, most: int | None = None) -> list[str]:
        """Say it in full, with what went wrong: of each kind at most so many."""
        rows = [
            ("servers", f"{self.launched} launched: {self._ends()}"),
            ("slowest starts", ", ".join(map(str, self.starts[:_MOST_SLOWEST]))),
            ("slowest stops", ", ".join(map(str, self.stops[:_MOST_SLOWEST]))),
            ("parallel stops", self._parallel() if self.one_by_one_s else ""),
            ("GPUs", self._gpus() if self.leases else ""),
        ]
        lines = [f"{name:15} {text}" for name, text in rows if text]
        for word, texts in (("DIED", self.died), ("UNKNOWN END", self.unknown), ("LEAK", self.leaks)):
            lines += [f"{word}: {text}" for text in texts[:most]]
            lines += [f"{word}: {len(texts) - most} more"] if most is not None and len(texts) > most else []
        return lines

    def _ends(self) -> str:
        counts = [f"{count} {_IN_WORDS[how]}" for how, count in self.ended.items() if count]
        counts += [f"{len(self.died)} of them DIED"] if self.died else []
        counts += [f"{len(self.unknown)} NOT SEEN TO END"] if self.unknown else []
        return ", ".join(counts) or "none has ended"

    def _parallel(self) -> str:
        return f"{self.saved_s:.2f} s saved ({self.one_by_one_s:.2f} s one by one, {self.parallel_s:.2f} s in parallel)"

    def _gpus(self) -> str:
        count = f"{len(self.leases)} lease" + "s" * (len(self.leases) != 1)
        return f"{count} of GPUs waited {sum(self.leases):.2f} s in all, at most {max(self.leases):.2f} s"


def _servers(count: int) -> str:
    return f"{count} server" + "s" * (count != 1)


def summarise(events: Iterable[Fields]) -> Summary:
    """Add up the events of a run. What is missing in one is taken for nothing: a report may be an older one's."""
    summary = Summary()
    by_kind: dict[str, dict[str, Fields]] = {"launched": {}, "ended": {}, "died": {}}
    for event in events:
        kind = _text(event, "event")
        if kind in by_kind:
            by_kind[kind][_text(event, "id")] = event
        else:
            _add(summary, kind, event)
    launched, ended, seen_dead = by_kind.values()
    summary.launched = len(launched)
    summary.unknown = [_unknown(event) for number, event in launched.items() if number not in ended]
    for number, event in ended.items():
        _add_end(summary, event, seen_dead.get(number, event))
    for times in (summary.starts, summary.stops):
        times.sort(key=lambda timed: -timed.seconds)
    return summary


def _add(summary: Summary, kind: str, event: Fields) -> None:
    if kind == "ready":
        summary.starts.append(_timed(event))
    elif kind == "stopped":
        summary.one_by_one_s += _number(event, "one_by_one_s")
        summary.parallel_s += _number(event, "seconds")
    elif kind == "leased":
        summary.leases.append(_number(event, "seconds"))
    elif kind == "leak":
        summary.leaks.append(_text(event, "text") + _where(event))


def _add_end(summary: Summary, event: Fields, death: Fields) -> None:
    how = _text(event, "how")
    if how in summary.ended:
        summary.ended[how] += 1
    name, where = repr(event.get("server")), _where(event)
    if event.get("died"):
        returncode = int(_number(event, "returncode")) if event.get("returncode") is not None else None
        summary.died.append(f"server {name}: {signals.describe(returncode)}{_where(death)}")
    if how != "exited":
        summary.stops.append(_timed(event))
    if how == "unkillable":
        pids = ", ".join(map(str, _list(event, "survivors") or ["?"]))
        summary.leaks.append(f"processes of server {name} survived SIGKILL: {pids}{where}")
    for device in _list(event, "gpu"):
        if isinstance(device, dict) and device.get("verdict") == "held":
            summary.leaks.append(f"memory of GPU {device.get('uuid')} did not come back from server {name}{where}")


def _unknown(event: Fields) -> str:
    return f"server {event.get('server')!r} (pid {event.get('server_pid')}){_where(event)}"


def _where(event: Fields) -> str:
    test, worker = _text(event, "test"), _text(event, "worker")
    places = [f"in {test}"] if test else []
    places += [f"on {worker}"] if worker else []
    return f" [{', '.join(places)}]" if places else ""


def _timed(event: Fields) -> Timed:
    return Timed(_text(event, "server"), _text(event, "test"), _number(event, "seconds"))


def _text(event: Fields, name: str) -> str:
    return str(event.get(name) or "")


def _list(event: Fields, name: str) -> list[Any]:
    value = event.get(name)
    return value if isinstance(value, list) else []


def _number(event: Fields, name: str) -> float:
    value: Any = event.get(name)
    return float(value) if isinstance(value, (int, float)) else 0.0
