"""The stacks that faulthandler writes, for people: without the frames of pytest, which are the same in each. Pure."""

from __future__ import annotations

_OF_PYTEST = (
    "/_pytest/",
    "/pytest/",
    "/pluggy/",
    "/xdist/",
    "/execnet/",
    "/bin/pytest",
    '"<frozen runpy>"',
    '"<string>"',
)


def readable(text: str) -> str:
    """Leave out the frames of pytest, pytest-xdist and what runs them."""
    return "\n".join(line for line in text.splitlines() if not _is_of_pytest(line))


def _is_of_pytest(line: str) -> bool:
    place = line.partition(", line ")[0]
    return line.startswith("  File ") and any(part in place for part in _OF_PYTEST)
