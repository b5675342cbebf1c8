"""Stopping servers that take 1.0 s to stop, and trees of many processes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tools.benchmarks import ways
from tools.benchmarks.processes import MILLISECONDS
from tools.benchmarks.rows import LIMIT, OURS, Row
from tools.benchmarks.runs import Plan, measured, measured_at_once, running

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import TypeAlias

    from tools.benchmarks.rows import Settings

    _Measure: TypeAlias = Callable[[Path, Plan], float]
    _Samples: TypeAlias = dict[str, list[float]]

_LIMIT = "signals to the same processes, known beforehand, and a wait for them all"
_KEEPER = "the keeper, in Python, finds, asks and reaps each process that the root has left"
# With a server that ignores SIGTERM, all ways have the same grace.
_GRACE_S = 2.0
_ROUNDS = 7
_SIZES = (10, 100, 1000)


def stop_1(settings: Settings) -> list[Row]:
    """Stop one server."""
    return [_stop("stop of 1 server", settings, Plan("", 1))]


def stop_8(settings: Settings) -> list[Row]:
    """Stop 8 servers; one of them ignoring SIGTERM; each with a child that has become a daemon."""
    rows = [_stop("stop of 8 servers", settings, Plan("", 8))]
    if not settings.is_quick:
        rows.append(_stop("stop of 8, one ignores SIGTERM", settings, Plan("", 8, grace_s=_GRACE_S, ignores=True)))
        rows += _daemons(settings)
    return rows


def stop_64(settings: Settings) -> list[Row]:
    """Stop 64 servers."""
    return [_stop("stop of 64 servers", settings, Plan("", 64))]


def trees(settings: Settings) -> list[Row]:
    """Stop a server whose tree has 10, 100, 1,000 processes, which its root leaves behind at its exit."""
    if settings.is_quick:
        return _tree(settings, 100, ways.OURS, 2)[:1]
    found = {size: _tree(settings, size, (*ways.ALONE, *ways.IN_TURN), _ROUNDS) for size in _SIZES}
    few, many = _SIZES[1:]
    each = {
        OURS: [took_ms / many for took_ms in found[many][0].samples[OURS]],
        LIMIT: [took_ms / few for took_ms in found[few][0].samples[OURS]],
    }
    linear = f"the same for each of {few}; up to 1.5 times that counts as linear"
    name = f"stop of a tree of {many}, for each process"
    return [*(row for rows in found.values() for row in rows), Row(name, "ms each", each, linear, math.inf, factor=1.5)]


def _tree(settings: Settings, size: int, chosen: tuple[str, ...], rounds: int) -> list[Row]:
    plan = Plan("", 1, stop_s=0.0, options=(f"children={size - 1}",))
    took, left = _times_and_left(lambda measure: measured(settings.scratch, plan, chosen, rounds, measure))
    took = {way: [took_s * MILLISECONDS for took_s in times_s] for way, times_s in took.items()}
    name = f"stop of a tree of {size}"
    return [
        Row(name, "ms", took, _LIMIT, 30.0, _KEEPER),
        Row(f"{name}: left at its return", "processes", left, "none", bound=1.0),
    ]


def _stop(name: str, settings: Settings, plan: Plan) -> Row:
    chosen = ways.OURS if settings.is_quick else ways.ALONE
    samples = measured(settings.scratch, plan, chosen, settings.choose(_ROUNDS, 1), _took_s)
    if not settings.is_quick:
        samples |= measured_at_once(settings.scratch, plan, ways.IN_TURN, _ROUNDS, _took_s)
    return Row(name, "s", samples, _LIMIT, bound=2.0)


def _daemons(settings: Settings) -> list[Row]:
    plan = Plan("", 8, options=("daemon",))

    def run(measure: _Measure) -> _Samples:
        found = measured(settings.scratch, plan, ways.ALONE, _ROUNDS, measure)
        return found | measured_at_once(settings.scratch, plan, ways.IN_TURN, _ROUNDS, measure)

    took, left = _times_and_left(run)
    name = "stop of 8, each with a daemon"
    return [
        Row(name, "s", took, _LIMIT, bound=2.0),
        Row(f"{name}: left at its return", "processes", left, "none", bound=1.0),
    ]


def _times_and_left(run: Callable[[_Measure], _Samples]) -> tuple[_Samples, _Samples]:
    """Give the seconds of each way, and how many processes were left when it returned."""
    left: _Samples = {}

    def measure(scratch: Path, plan: Plan) -> float:
        took_s, count = _stopped(scratch, plan)
        left.setdefault(plan.way, []).append(float(count))
        return took_s

    return run(measure), left


def _stopped(scratch: Path, plan: Plan) -> tuple[float, int]:
    with running(scratch, plan) as run:
        said = run.told()
        return said["took_s"], said["left"]


def _took_s(scratch: Path, plan: Plan) -> float:
    took_s, left = _stopped(scratch, plan)
    if left:
        raise RuntimeError(f"{plan} has left {left} processes")
    return took_s
