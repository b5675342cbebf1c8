"""What NVML says of every device, once, for people who ask: a driver that hangs is reported, not waited for."""

from __future__ import annotations

import select
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from harness.broker.readers import Opened, Read, Readers
from harness.broker.readings import Fault

if TYPE_CHECKING:
    from harness.broker.readings import Device, Reading


@dataclass(frozen=True)
class Survey:
    """All devices, and a reading of each, or why there is none.

    `failure` says why there are no devices, "" where that is not out of order; `is_absent`: there is no NVIDIA driver.
    """

    devices: tuple[Device, ...] = ()
    readings: dict[str, Reading | Fault] = field(default_factory=dict)
    failure: str = ""
    is_absent: bool = False


def survey(limit_s: float) -> Survey:
    """Read all devices, at the same time, for at most `limit_s` seconds.

    Each call leaves its threads behind: it is for programs that end soon.
    """
    readers = Readers()
    deadline = time.monotonic() + limit_s
    opened: Opened | None = None
    readings: dict[str, Reading | Fault] = {}
    while (opened is None or len(readings) < len(opened.devices)) and _has_news(readers, deadline):
        for news in readers.take():
            if isinstance(news, Read):
                readings[news.uuid] = news.reading
            else:
                opened = news
                for device in news.devices:
                    readers.ask(device.uuid)
    silence = f"NVML has not answered for {limit_s:g} s: the driver hangs"
    if opened is None:
        return Survey(failure=silence)
    readings = {device.uuid: readings.get(device.uuid, Fault("unknown", silence)) for device in opened.devices}
    return Survey(opened.devices, readings, opened.failure, opened.is_absent)


def _has_news(readers: Readers, deadline: float) -> bool:
    poll = select.poll()
    poll.register(readers.descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
