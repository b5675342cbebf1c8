"""The sampler's process, and what its samples say."""

from __future__ import annotations

import array
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

SLACK_BYTES = 64 << 20
_SAMPLER = Path(__file__).with_name("gpu_sampler.py")


class Sampler:
    """Samples a device while it is entered."""

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid
        self.times: list[float] = []
        self.used: list[float] = []

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
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        samples = array.array("d")
        samples.frombytes(self._path.read_bytes())
        self.times, self.used = list(samples[0::2]), list(samples[1::2])
        self._folder.cleanup()

    @property
    def period_ms(self) -> float:
        """Give the longest time between two samples."""
        return max(later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)) * 1e3

    def freed_between(self, base_bytes: float, until: float | None = None) -> tuple[float, float]:
        """Give the last sample at which it was not free, and the first one from which on it was, up to `until`."""
        seen = [(at, used) for at, used in zip(self.times, self.used, strict=True) if until is None or at <= until]
        last = max((index for index, (_, used) in enumerate(seen) if used > base_bytes + SLACK_BYTES), default=-1)
        if last + 1 >= len(seen):
            return seen[-1][0], float("inf")
        return (seen[last][0] if last >= 0 else float("-inf")), seen[last + 1][0]

    def at(self, moment: float) -> float:
        """Give the bytes in use at the last sample before a moment."""
        return [used for at, used in zip(self.times, self.used, strict=True) if at <= moment][-1]
