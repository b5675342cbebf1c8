"""Events as lines of JSON: what `--harness-report` holds, and what pytest-xdist's workers tell their controller."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from harness.journal import Event

Fields = dict[str, Any]
# What is for those who watch a run, and is in no report: a line each second.
PASSING = frozenset({"waiting", "waited"})


class Source(NamedTuple):
    """Where an event comes from: a worker ("" without pytest-xdist), its process, and the test that ran."""

    worker: str
    pid: int
    test: str


def fields(event: Event, source: Source, clock_offset_s: float) -> Fields:
    """Give an event as JSON can hold it; `clock_offset_s` is the wall clock's time less the monotonic one's."""
    times = {"wall_s": round(event.monotonic_s + clock_offset_s, 6), "monotonic_s": round(event.monotonic_s, 6)}
    return {"event": event.kind, **times, **source._asdict(), **event.facts}


def line(event: Fields) -> bytes:
    """Give an event as a line, in ASCII: names may hold what no encoding can."""
    return json.dumps(event).encode() + b"\n"


def parse(data: bytes) -> list[Fields]:
    """Give the events of some lines. A line that is none, and one that is torn by a crash, is left out."""
    found = []
    for text in data.split(b"\n"):
        try:
            event = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            found.append(event)
    return found


def merged(events: Iterable[Fields]) -> list[Fields]:
    """Give events of many processes in the order in which they happened: the monotonic clock is one for a machine."""
    return sorted(events, key=_moment)


def _moment(event: Fields) -> float:
    moment = event.get("monotonic_s")
    return moment if isinstance(moment, (int, float)) else 0.0
