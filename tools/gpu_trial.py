"""What is kept of one scenario that was run once, and how an answer is held against the sampler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import harness
    from tools.gpu_polling import Polling
    from tools.gpu_sampling import Moment

LATEST_MS = 10.0


class NotShown(Exception):  # noqa: N818 - it reads as what happened
    """What a scenario is to show cannot be brought about on this machine."""


@dataclass
class Trial:
    """One scenario, once. Each verdict, and each answer of today's logic, is (said, true).

    `not_shown` says why what it was to show could not be brought about here. `logs` are there if something was wrong.
    """

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    verdicts: list[tuple[str, str]] = field(default_factory=list)
    answers: list[tuple[str, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    not_shown: str = ""
    logs: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def verdict(self, said: str, true: str, row: harness.DeviceRelease) -> None:
        """Take a verdict of the harness."""
        self.verdicts.append((said, true))
        if said != true:
            self.wrong.append(f"verdict {said}, and it was {true}: {row}")

    def freed_at(self, at: float | None, moment: Moment, *, is_exact: bool = True) -> None:
        """Hold the moment at which the harness saw memory free against the samples.

        `is_exact`: the sampler saw this tenant's memory alone, so an answer can be late, too.
        """
        if at is None or moment.free is None:
            self.wrong.append(f"freed at {at}, and the sampler has it free at {moment.at}")
            return
        if moment.held is None:
            self.not_shown = "nothing was held"
            return
        behind_ms = (at - moment.at) * 1e3
        if moment.is_after(at):
            self.wrong.append(f"said free {-behind_ms:.3f} ms before the sampler, {moment.window_ms:.3f} ms exact")
        if is_exact:
            self._most("behind_sampler_ms", round(behind_ms, 3))
            self._most("sampler_window_ms", round(moment.window_ms, 3))
            if behind_ms > LATEST_MS:
                self.wrong.append(f"said free {behind_ms:.1f} ms after the sampler")

    def _most(self, name: str, value: float) -> None:
        self.figures[name] = max(value, self.figures.get(name, value))

    def today(self, name: str, polling: Polling, moment: Moment) -> None:
        """Hold an answer of today's logic against the samples; it is no fault of the harness if it is wrong."""
        at = polling.ended_at if polling.freed_at is None else polling.freed_at
        true = "held" if moment.is_after(at) or not moment.is_free else "freed"
        self.answers.append((polling.answer, true))
        self.figures[name] = (
            round((at - moment.at) * 1e3, 1)
            if polling.answer == true == "freed"
            else (polling.answer if polling.answer == true else f"wrong: says {polling.answer}")
        )
