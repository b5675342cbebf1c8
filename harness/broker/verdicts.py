"""Whether the memory of a device is back: judged from two readings, and from whose the listed processes are. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.broker.readings import Fault

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from harness.broker.readings import Reading

# Drivers keep a little for a while; on an H100 with driver 580 nothing was left, each time.
SLACK_BYTES = 64 << 20


@dataclass(frozen=True)
class Judgement:
    """What a reading says, compared with the baseline.

    `verdict` is freed, held or unknown. `own` are pids of the server that are listed still, `foreign` those that came
    since the baseline and are nobody's that the store knows. `excess_bytes` is what is more in use than before, as far
    as it is not known to be another's.
    """

    verdict: str
    own: tuple[int, ...]
    foreign: tuple[int, ...]
    excess_bytes: int
    note: str


def judge(
    baseline: Reading,
    now: Reading | Fault,
    *,
    own: AbstractSet[int],
    neighbours: AbstractSet[int],
    sees_pids: bool,
    is_shared: bool,
    gone: AbstractSet[int] = frozenset(),
    slack_bytes: int = SLACK_BYTES,
) -> Judgement:
    """Judge one device of one server: `own` are its pids, `neighbours` those of the device's other leases.

    `sees_pids`: the device lists this server's processes when it has some. `is_shared`: others have a lease on it.
    `gone` are listed pids that no process has any more.
    """
    if isinstance(now, Fault) or now.version != baseline.version:
        why = now.text if isinstance(now, Fault) else "its memory was read in two ways that cannot be compared"
        return Judgement("unknown", (), (), 0, why)
    listed = set(now.processes or {})
    mine = tuple(sorted(listed & own))
    foreign = tuple(sorted(listed - own - neighbours - set(baseline.processes or {})))
    excess = now.used_bytes - baseline.used_bytes
    if mine:
        held = [(now.processes or {})[pid] for pid in mine]
        told = [one for one in held if one is not None]
        return Judgement("held", mine, foreign, sum(told) if len(told) == len(held) else excess, "")
    before_bytes, now_bytes = unlisted_bytes(baseline), unlisted_bytes(now)
    if sees_pids and before_bytes is not None and now_bytes is not None:
        # Whoever is listed, and has ended, is no stranger that could be asked: it may be the server's, unseen before.
        ended = [pid for pid in foreign if pid in gone]
        excess = now_bytes - before_bytes + sum((now.processes or {})[pid] or 0 for pid in ended)
        is_held = excess > slack_bytes
        note = "no process that is listed, and lives, holds it" if is_held else ""
        foreign = tuple(pid for pid in foreign if pid not in gone)
        return Judgement("held" if is_held else "freed", (), foreign, excess, note)
    return _judge_totals(baseline, excess, foreign, is_shared=is_shared, slack_bytes=slack_bytes)


def _judge_totals(
    baseline: Reading, excess: int, foreign: tuple[int, ...], *, is_shared: bool, slack_bytes: int
) -> Judgement:
    """Judge where it is not told which process holds how much."""
    note = "the driver does not say which process holds what, so the device's total was compared"
    if excess <= slack_bytes:
        if baseline.used_bytes <= slack_bytes:
            return Judgement("freed", (), foreign, excess, note)
        why = "others had memory on it before, and may have given that back"
    elif is_shared:
        why = "others have leased a part of it"
    elif foreign:
        why = "others have come meanwhile"
    elif baseline.processes:
        why = "others had memory on it before, and may have taken more"
    else:
        return Judgement("held", (), foreign, excess, f"{note}; it cannot be told whose it is")
    return Judgement("unknown", (), foreign, excess, f"{note}, and that does not tell: {why}")


def unlisted_bytes(reading: Reading) -> int | None:
    """Give what no listed process holds; None if that is not told of each."""
    if reading.processes is None:
        return None
    total = 0
    for held in reading.processes.values():
        if held is None:
            return None
        total += held
    return reading.used_bytes - total
