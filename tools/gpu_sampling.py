"""The sampler's process, and what its samples say."""

from __future__ import annotations

import array
import itertools
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from types import TracebackType

SLACK_BYTES = 64 << 20
_SAMPLER = Path(__file__).with_name("gpu_sampler.py")
_START = 20


class Sample(NamedTuple):
    """One reading: the driver gave `used` bytes at some moment between the monotonic times `begun` and `ended`."""

    begun: float
    ended: float
    used: float


@dataclass(frozen=True)
class Moment:
    """When the memory was back for good: after the reading `held` began, and before the reading `free` ended.

    `held` is None where it was never held, `free` None where it never came back.
    """

    held: Sample | None
    free: Sample | None

    @property
    def is_free(self) -> bool:
        return self.free is not None

    @property
    def at(self) -> float:
        """Give when the sampler knew that it was back."""
        return self.free.ended if self.free is not None else float("inf")

    @property
    def window_ms(self) -> float:
        """Give how exactly the sampler knows it: the driver answers nobody while it tears a process down."""
        return (self.at - (self.held.begun if self.held is not None else self.at)) * 1e3

    def is_after(self, moment: float) -> bool:
        """Say whether the memory was held at a moment: a reading that had not ended by then shows it so."""
        return self.held is not None and moment <= self.held.ended


class Sampler:
    """Samples a device while it is entered."""

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid
        self.samples: list[Sample] = []

    def __enter__(self) -> Sampler:  # noqa: PYI034 - typing.Self is there from Python 3.11 on
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / "samples"
        command = [sys.executable, str(_SAMPLER), self._uuid, str(self._path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"up\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._process.communicate(timeout=30)  # which closes its standard input
            values = array.array("d")
            values.frombytes(self._path.read_bytes())
            self.samples = [Sample(*values[at : at + 3]) for at in range(0, len(values), 3)]
            assert self._process.returncode == 0 or kind is not None, "the sampler ran out of room"
        finally:
            self._process.kill()
            self._process.wait()
            self._folder.cleanup()

    @property
    def base(self) -> float:
        """Give the bytes in use at the start."""
        return statistics.median(sample.used for sample in self.samples[:_START])

    @property
    def end(self) -> float:
        """Give the bytes in use at the end."""
        return self.samples[-1].used

    @property
    def peak(self) -> float:
        """Give the most bytes in use."""
        return max(sample.used for sample in self.samples)

    def used_at(self, moment: float) -> float:
        """Give the bytes in use by the last reading before a moment."""
        return [sample.used for sample in self.samples if sample.ended <= moment][-1]

    def freed(self, limit_bytes: float, until: float = float("inf")) -> Moment:
        """Give when the use came down to a limit, not to leave it again (`until` a moment)."""
        seen = [sample for sample in self.samples if sample.ended <= until]
        after = max((at + 1 for at, sample in enumerate(seen) if sample.used > limit_bytes), default=0)
        return Moment(seen[after - 1] if after else None, seen[after] if after < len(seen) else None)

    def figures(self) -> dict[str, float]:
        """Say how well it has sampled: what it was late itself, and what the driver kept it waiting."""
        pairs = list(itertools.pairwise(self.samples))
        return {
            "sampler_period_ms": round(statistics.median(b.begun - a.begun for a, b in pairs) * 1e3, 3),
            "sampler_late_ms": round(max(b.begun - a.ended for a, b in pairs) * 1e3, 2),
            "sampler_longest_reading_ms": round(max(one.ended - one.begun for one in self.samples) * 1e3, 2),
        }
