"""What NVML says of devices, as frozen types. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Device:
    """A GPU, or one MIG instance of it, whose GPU's UUID is `parent` then. `index` is NVML's: the order of the bus."""

    uuid: str
    index: int
    name: str
    total_bytes: int
    parent: str = ""


@dataclass(frozen=True)
class Reading:
    """A device's memory at one moment.

    `version` is that of NVML's memory info (1 counts the driver's own reserve as used, 2 does not). `processes` gives
    the bytes of each process by pid, None where they are not told; it is None where there is no list.
    """

    used_bytes: int
    total_bytes: int
    version: int
    processes: Mapping[int, int | None] | None


@dataclass(frozen=True)
class Fault:
    """Why there is no reading. `kind` is "lost" for a device that will not come back by itself, else "unknown"."""

    kind: str
    text: str


@dataclass(frozen=True)
class Read:
    """A device was read between two monotonic times. While a process ends the driver may keep a reader for seconds."""

    uuid: str
    begun: float
    ended: float
    reading: Reading | Fault
