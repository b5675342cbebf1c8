"""Reads expectations that are written as a grid: a row for each state, a column for each thing that happens."""

from __future__ import annotations


def cells(text: str) -> list[tuple[str, str, str]]:
    """Give (row, column, cell) for each cell."""
    head, *rows = [line.split() for line in text.strip().splitlines()]
    return [(row[0], column, cell) for row in rows for column, cell in zip(head, row[1:], strict=True)]
