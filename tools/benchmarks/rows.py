"""What a benchmark gives: rows, each with what every way took, held to a limit measured beside them. Pure."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

OURS = "harness"
LIMIT = "limit"
_WAYS = ("pytest-xprocess", "mirakuru", "Popen + psutil", "one by one", "thread each", "kill alone")
_COLUMNS = (OURS, LIMIT, *_WAYS, "psutil", "filelock")
_FACTOR = 1.05
_LEGEND = (
    f'Median (lowest..highest). "At most": {_FACTOR} times the limit, and 10 ms where it is a time.'
    ' "Never": not as long as was looked.'
)
_ALLOWANCE = {"s": 0.010, "ms": 10.0}


@dataclass(frozen=True)
class Settings:
    """How thoroughly to measure, and a directory for everything that a benchmark writes."""

    is_quick: bool
    scratch: Path

    def choose(self, full: int, quick: int) -> int:
        """Give a number of repetitions."""
        return quick if self.is_quick else full


@dataclass(frozen=True)
class Row:
    """One thing that was measured: for each way its samples, infinite where it never came.

    `bound` is what --quick holds the ratio of ours to the limit to: generous, for a busy machine. A limit of 0 has no
    ratio, and is then exact. `reason` says what stands in the way, where more than the limit is taken, and `explained`
    how much of that was measured apart. `factor`: how often the limit ours may be.
    """

    name: str
    unit: str
    samples: Mapping[str, Sequence[float]]
    limit: str
    bound: float
    reason: str = ""
    explained: float | None = None
    factor: float = _FACTOR

    @property
    def ours(self) -> float:
        return statistics.median(self.samples[OURS])

    @property
    def limits(self) -> float:
        return statistics.median(self.samples[LIMIT])

    @property
    def most(self) -> float:
        """Give what ours may take: 1.05 times the limit, and 10 ms where it is a time."""
        return self.factor * self.limits + _ALLOWANCE.get(self.unit, 0.0)

    @property
    def is_over(self) -> bool:
        return self.ours > self.most

    @property
    def guarded(self) -> float:
        """Give what --quick lets ours take."""
        if self.bound == math.inf:
            return math.inf
        return self.bound * self.limits

    @property
    def is_broken(self) -> bool:
        """Say whether it is far over: a regression."""
        return self.ours > self.guarded

    @property
    def judgement(self) -> str:
        if not self.is_over:
            return "within"
        return "noted" if self.reason else "OVER"

    @property
    def note(self) -> str:
        """Say why it is over the limit, and how much of that was measured apart."""
        if self.explained is None:
            return self.reason.rstrip(".")
        apart, more = number(self.explained), number(self.ours - self.limits)
        return (
            f"{self.reason} Measured apart that is {apart} {self.unit}; it takes {more} {self.unit} more than the limit"
        )

    def as_json(self) -> dict[str, Any]:
        """Give all samples; null is one that never came."""
        samples = {way: [None if math.isinf(one) else one for one in found] for way, found in self.samples.items()}
        most = None if math.isinf(self.most) else self.most
        about = {
            "limit": self.limit,
            "most": most,
            "judgement": self.judgement,
            "note": self.note if self.is_over else "",
        }
        return {"name": self.name, "unit": self.unit, "samples": samples, **about}


def markdown(rows: Sequence[Row]) -> str:
    """Give a table with median and lowest to highest, and the reasons below it."""
    ways = _columns(rows)
    heads = ("", *ways, "at most", "")
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        cells = [f"{row.name}, {row.unit}", *(_cell(row.samples.get(way)) for way in ways), number(row.most)]
        lines.append("| " + " | ".join([*cells, row.judgement]) + " |")
    return "\n".join([*lines, "", *_notes(rows)])


def table(rows: Sequence[Row]) -> str:
    """Give the same for a terminal, medians alone."""
    ways = _columns(rows)
    heads = ("", *ways, "at most", "")
    cells = [
        (
            f"{row.name}, {row.unit}",
            *(_median(row.samples.get(way)) for way in ways),
            number(row.most),
            row.judgement,
        )
        for row in rows
    ]
    return "\n".join([*columns([heads, *cells]), "", *_notes(rows)])


def guards(rows: Sequence[Row]) -> str:
    """Give what --quick looks at."""
    heads = ("", OURS, LIMIT, "guarded at", "")
    cells = [
        (
            f"{row.name}, {row.unit}",
            *(_median(row.samples[way]) for way in (OURS, LIMIT)),
            number(row.guarded),
            "BROKEN" if row.is_broken else "ok",
        )
        for row in rows
        if row.bound < math.inf
    ]
    return "\n".join(columns([heads, *cells]))


def _columns(rows: Sequence[Row]) -> list[str]:
    return [way for way in _COLUMNS if any(way in row.samples for row in rows)]


def _notes(rows: Sequence[Row]) -> list[str]:
    """Say what the limits are, and what is in the way where they are not kept; what is said of several is said once."""
    limits: dict[str, list[str]] = {}
    reasons: dict[str, list[str]] = {}
    for row in rows:
        limits.setdefault(row.limit, []).append(row.name)
        if row.is_over and row.reason:
            reasons.setdefault(row.note, []).append(row.name)
    return [
        _LEGEND,
        "",
        *(f"- The limit of {'; '.join(names)}: {text}." for text, names in limits.items()),
        *(f"- Over the limit, {'; '.join(names)}: {text}." for text, names in reasons.items()),
    ]


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Give rows of cells as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cell(samples: Sequence[float] | None) -> str:
    if not samples:
        return ""
    if min(samples) == max(samples):
        return number(samples[0])
    return f"{_median(samples)} ({number(min(samples))}..{number(max(samples))})"


def _median(samples: Sequence[float] | None) -> str:
    return number(statistics.median(samples)) if samples else ""


def number(value: float) -> str:
    """Give a number with as many digits as it needs."""
    if math.isinf(value):
        return "never"
    return f"{value:.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"
