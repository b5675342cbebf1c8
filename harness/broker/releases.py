"""How the memory of one device comes back from one tenant: fed with readings, it says when, or that not. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.broker import verdicts
from harness.broker.readings import Fault, Reading

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from harness.broker.readings import Read

# A reading that takes longer is a driver that hangs: it is not waited for.
ANSWER_S = 5.0
# How long is looked on where no more can be learnt than that nothing can be told.
UNTELLABLE_S = 2.0
# Memory that comes back is looked for this often at first; a reading costs some 50 microseconds.
FIRST_PAUSE_S = 0.001
LONGEST_PAUSE_S = 0.1
# The pause is this part of the time that has been waited, so the answer is late by at most as much.
_PAUSE_PART = 0.0005
# How often a server that runs is looked at, for its peak and its processes; soon after its launch more often.
FIRST_SAMPLE_S = 0.005
SAMPLE_S = 0.25
_SAMPLE_PART = 0.01


def sample_s(age_s: float) -> float:
    """Give the time between two looks at a server that has run for some time."""
    return min(max(FIRST_SAMPLE_S, age_s * _SAMPLE_PART), SAMPLE_S)


def pause_s(waited_s: float) -> float:
    """Give the pause between two readings after some time of waiting: 1 ms for 2 s, 10 ms after 20 s."""
    return min(max(FIRST_PAUSE_S, waited_s * _PAUSE_PART), LONGEST_PAUSE_S)


@dataclass(frozen=True)
class Others:
    """Who else is on the device: the pids of other leases' tenants, and whether there are any.

    `sees_pids`: the devices of this machine have listed a server's process before, so they do. `gone` are listed pids
    that no process has.
    """

    pids: AbstractSet[int] = frozenset()
    are_there: bool = False
    sees_pids: bool = False
    gone: AbstractSet[int] = frozenset()


class Release:
    """One device of one tenant, from its launch until its memory is back, or is given up."""

    def __init__(self, baseline: Reading | None) -> None:
        """Take the device's baseline, None if the store has lost it."""
        self.baseline = baseline
        self.own: set[int] = set()
        self.peak_bytes: int | None = None
        self.now: Reading | Fault = Fault("unknown", "there was no reading")
        self.judgement = verdicts.Judgement("unknown", (), (), 0, "there was no reading")
        self.freed_at: float | None = None
        self._has_judged_after_end = False
        self._began: float | None = None
        self._gone: float | None = None

    @property
    def is_waited_for(self) -> bool:
        """Say whether its server has begun to end."""
        return self._began is not None

    def asked(self, now: float) -> None:
        """Take note that the server has begun to end."""
        self._began = now if self._began is None else self._began

    def gone(self, now: float) -> None:
        """Take note that nothing of the server is left, or that nothing more of it will end."""
        self.asked(now)
        self._gone = now if self._gone is None else self._gone

    def waited_s(self, now: float) -> float:
        """Give the time since the stop began."""
        return 0.0 if self._began is None else now - self._began

    def feed(self, read: Read, others: Others) -> None:
        """Take a reading; `own` has been brought up to date before."""
        self.now = read.reading
        if isinstance(read.reading, Reading):
            self.peak_bytes = max(read.reading.used_bytes, self.peak_bytes or 0)
        # One that was begun before says nothing certain of the time after.
        if self._began is None or read.begun < self._began:
            return
        self.judgement = self._judge(read.reading, others)
        self._has_judged_after_end = self._gone is not None and read.begun >= self._gone
        if self.judgement.verdict != "freed":
            self.freed_at = None
        elif self.freed_at is None:
            self.freed_at = read.ended

    def _judge(self, reading: Reading | Fault, others: Others) -> verdicts.Judgement:
        if self.baseline is None:
            return verdicts.Judgement("unknown", (), (), 0, "its baseline has been lost from the store")
        return verdicts.judge(
            self.baseline,
            reading,
            own=self.own,
            neighbours=others.pids,
            sees_pids=others.sees_pids or self._sees_pids,
            is_shared=others.are_there,
            gone=others.gone,
        )

    @property
    def _sees_pids(self) -> bool:
        # Memory was taken, but the device lists nobody of the server: its pids are of another namespace.
        taken = (self.peak_bytes or 0) - (self.baseline.used_bytes if self.baseline is not None else 0)
        return bool(self.own) or taken <= verdicts.SLACK_BYTES

    @property
    def is_back_early(self) -> bool:
        """Say whether the memory that the server was seen to hold is back, though its tree has not ended yet."""
        return self._gone is None and bool(self.own) and self.freed_at is not None

    def verdict(self, now: float, limit_s: float) -> str | None:
        """Give the final verdict, None as long as there is none; `limit_s` counts from the server's end."""
        if self._gone is None:
            return None
        since_s = now - self._gone
        if self._has_judged_after_end:
            if self.judgement.verdict == "freed" or (isinstance(self.now, Fault) and self.now.kind == "lost"):
                return self.judgement.verdict
            if self.judgement.verdict == "unknown":
                patience_s = ANSWER_S if isinstance(self.now, Fault) else UNTELLABLE_S
                return "unknown" if since_s >= min(patience_s, limit_s) else None
            return self.judgement.verdict if since_s >= limit_s else None
        # No reading since then: the driver hangs, or is slow.
        return "unknown" if since_s >= min(ANSWER_S, limit_s) else None

    @property
    def is_judged(self) -> bool:
        """Say whether a reading has shown how it is since the server's end."""
        return self._has_judged_after_end and not isinstance(self.now, Fault)

    @property
    def note(self) -> str:
        """Say what is not obvious about the verdict."""
        if self._gone is not None and not self._has_judged_after_end:
            return f"NVML has not answered for {ANSWER_S:g} s"
        return self.judgement.note
