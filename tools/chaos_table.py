"""The table of a run: what was done to whom, how often, and what came of it."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tools.chaos_result import Result

_COLUMNS = (
    "fault",
    "target",
    "trials",
    "survivors",
    "bystanders harmed",
    "left to the sweep",
    "step not reached",
    "clean after s (median)",
    "(max)",
)


def row(fault: str, target: str, results: Sequence[Result]) -> tuple[str, ...]:
    """Give one line: how many trials, and in how many of them what."""
    times = [result.clean_s for result in results if result.clean_s is not None and result.is_reached]
    return (
        fault,
        target,
        str(len(results)),
        str(sum(bool(result.survivors) for result in results)),
        str(sum(bool(result.harmed) for result in results)),
        str(sum(result.left_to_sweep > 0 for result in results)),
        str(sum(not result.is_reached for result in results)),
        f"{statistics.median(times):.2f}" if times else "-",
        f"{max(times):.2f}" if times else "-",
    )


def table(results: Sequence[Result]) -> str:
    """Give the table as Markdown, whose columns are also straight in a terminal."""
    keys = sorted({(result.fault, result.target) for result in results})
    rows = [row(*key, [result for result in results if (result.fault, result.target) == key]) for key in keys]
    rows.append(row("all", "", results))
    widths = [max(len(line[column]) for line in (_COLUMNS, *rows)) for column in range(len(_COLUMNS))]
    ruler = tuple("-" * width for width in widths)
    return "\n".join(_line(line, widths) for line in (_COLUMNS, ruler, *rows))


def _line(cells: Iterable[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
