"""What a benchmark gives: figures, each compared with a peer that was measured side by side, and held to a limit."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_HEADINGS = ("figure", "measured", "lowest..highest", "peer", "compared", "limit", "")


@dataclass(frozen=True)
class Settings:
    """How thoroughly to measure, and a directory for everything that a benchmark writes."""

    is_quick: bool
    scratch: Path

    def choose(self, full: int, quick: int) -> int:
        """Give a number of repetitions."""
        return quick if self.is_quick else full


@dataclass(frozen=True)
class Figure:
    """One number that is held to a limit. `compared` is what the limit speaks of."""

    name: str
    unit: str
    samples: Sequence[float]
    peers: Sequence[float]
    compared: float
    limit: float
    is_ratio: bool = False
    note: str = ""
    is_over: bool = field(init=False)

    def __post_init__(self) -> None:
        """Judge it."""
        object.__setattr__(self, "is_over", self.compared > self.limit)


def ratio(name: str, unit: str, samples: Sequence[float], peers: Sequence[float], limit: float) -> Figure:
    """Hold the median of sample / peer, pair by pair, to a limit."""
    ratios = [sample / peer for sample, peer in zip(samples, peers, strict=True)]
    return Figure(name, unit, samples, peers, statistics.median(ratios), limit, is_ratio=True)


def difference(name: str, unit: str, samples: Sequence[float], peers: Sequence[float], limit: float) -> Figure:
    """Hold the median of sample - peer, pair by pair, to a limit."""
    differences = [sample - peer for sample, peer in zip(samples, peers, strict=True)]
    return Figure(name, unit, samples, peers, statistics.median(differences), limit)


def plain(name: str, unit: str, samples: Sequence[float], limit: float, *, note: str = "") -> Figure:
    """Hold the median itself to a limit."""
    return Figure(name, unit, samples, (), statistics.median(samples), limit, note=note)


def table(figures: Sequence[Figure]) -> str:
    """Give the figures as lines of aligned columns, notes below."""
    rows = [_HEADINGS, *(_row(figure) for figure in figures)]
    lines = columns(rows)
    notes = [f"{figure.name}: {figure.note}" for figure in figures if figure.note]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Give rows of cells as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(figure: Figure) -> tuple[str, ...]:
    return (
        figure.name,
        f"{number(statistics.median(figure.samples))} {figure.unit}",
        f"{number(min(figure.samples))}..{number(max(figure.samples))} ({len(figure.samples)})",
        f"{number(statistics.median(figure.peers))} {figure.unit}" if figure.peers else "-",
        _comparison(figure, figure.compared),
        _comparison(figure, figure.limit),
        "OVER" if figure.is_over else "ok",
    )


def _comparison(figure: Figure, value: float) -> str:
    if figure.is_ratio:
        return f"x {value:.3f}"
    sign = "+" if figure.peers and value >= 0 else ""
    return f"{sign}{number(value)} {figure.unit}"


def number(value: float) -> str:
    """Give a number with as many digits as it needs."""
    return f"{value:.0f}" if value == int(value) else f"{value:.2f}"
