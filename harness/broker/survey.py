"""What NVML says of every device, once, for people who ask: a driver that hangs is reported, not waited for."""

from __future__ import annotations

import functools
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from harness.broker.nvml import NoGpuSupport, Nvml
from harness.broker.readings import Fault

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.broker.readings import Device, Reading

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Survey:
    """All devices, and a reading of each, or why there is none.

    `failure` says why NVML tells of no devices, "" if it does; `is_absent`: there is no NVIDIA driver, so nothing is
    out of order.
    """

    devices: tuple[Device, ...] = ()
    readings: dict[str, Reading | Fault] = field(default_factory=dict)
    failure: str = ""
    is_absent: bool = False


class _Question(threading.Thread, Generic[_Answer]):
    """A call in a thread of its own, which ends with the call."""

    def __init__(self, call: Callable[[], _Answer]) -> None:
        super().__init__(name="asks NVML", daemon=True)
        self._call = call
        self._answer: _Answer | None = None
        self.start()

    def run(self) -> None:
        self._answer = self._call()

    def answer(self, deadline: float) -> _Answer | None:
        """Wait for the answer; None if there is none in time."""
        self.join(max(0.0, deadline - time.monotonic()))
        return self._answer


def survey(limit_s: float) -> Survey:
    """Read all devices, at the same time, for about `limit_s` seconds at most."""
    deadline = time.monotonic() + limit_s
    silence = f"NVML has not answered for {limit_s:g} s: the driver hangs"
    opened = _Question(_open).answer(deadline)
    if opened is None:
        return Survey(failure=silence)
    nvml, found = opened
    if nvml is None:
        return found
    questions = {device.uuid: _Question(functools.partial(_read, nvml, device.uuid)) for device in found.devices}
    answers = {uuid: question.answer(deadline) for uuid, question in questions.items()}
    if None not in answers.values():
        _Question(nvml.close).answer(deadline)
    return Survey(found.devices, {uuid: answer or Fault("unknown", silence) for uuid, answer in answers.items()})


def _open() -> tuple[Nvml | None, Survey]:
    try:
        nvml = Nvml()
        return nvml, Survey(tuple(nvml.devices()))
    except NoGpuSupport as error:
        return None, Survey(failure=str(error), is_absent=error.is_absent)
    except Exception as error:  # noqa: BLE001 - people are told, whatever it is
        return None, Survey(failure=f"NVML failed: {type(error).__name__}: {error}")


def _read(nvml: Nvml, uuid: str) -> Reading | Fault:
    try:
        return nvml.read(uuid)
    except Exception as error:  # noqa: BLE001 - as above
        return Fault("unknown", f"NVML failed: {type(error).__name__}: {error}")
