"""What a trial is run with, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.chaos_bystanders import Bystanders
    from tools.chaos_count import Places


@dataclass
class Result:
    """What came of a trial. Times are in seconds; `clean_s` counts from the fault."""

    seed: int
    fault: str
    target: str
    step: str
    workers: int
    ways: list[str] = field(default_factory=list)
    is_reached: bool = False
    clean_s: float | None = None
    survivors: list[str] = field(default_factory=list)
    harmed: list[str] = field(default_factory=list)
    left_to_sweep: int = 0
    error: str = ""
    output: str = ""
    seconds: float = 0.0

    @property
    def is_failure(self) -> bool:
        """Say whether the promise was broken, or the trial itself."""
        return bool(self.survivors or self.harmed or self.error)


@dataclass(frozen=True)
class Around:
    """What a trial is run with.

    `limit_s` is the time from the fault until nothing may be left: the crash grace, what the product gives a process
    that it cannot kill, and the end of the test run. `flaw`, for tests of the judging: the suite itself leaves a
    "survivor", or does "harm" to the bystander.
    """

    places: Places
    bystanders: Bystanders
    limit_s: float
    flaw: str = ""
