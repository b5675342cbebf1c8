"""Threads that read devices: one for each, so that a call that hangs in the driver holds up nothing but its device."""

from __future__ import annotations

import os
import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.broker.nvml import NoGpuSupport, Nvml
from harness.broker.readings import Fault, Read

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.broker.readings import Device, Reading


@dataclass(frozen=True)
class Opened:
    """NVML is there, with these devices; or it is not (`failure` says why and what to do).

    `is_absent`: there is no NVIDIA driver on this machine, and nothing is out of order.
    """

    devices: tuple[Device, ...]
    failure: str
    is_absent: bool = False


class _Reader:
    """One device's thread. It reads when it is asked to, and every `interval_s` if that is set."""

    def __init__(self, uuid: str, read: Callable[[str], Reading | Fault], told: Callable[[Read], None]) -> None:
        self._uuid = uuid
        self._read = read
        self._told = told
        self._changed = threading.Condition()
        self._is_asked = False
        self._interval_s: float | None = None
        threading.Thread(target=self._run, name=f"reader of {uuid}", daemon=True).start()

    def ask(self) -> None:
        with self._changed:
            self._is_asked = True
            self._changed.notify()

    def every(self, interval_s: float | None) -> None:
        with self._changed:
            is_sooner = interval_s is not None and (self._interval_s is None or interval_s < self._interval_s)
            self._interval_s = interval_s
            if is_sooner:
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._is_asked:
                    self._changed.wait(self._interval_s)
                is_wanted = self._is_asked or self._interval_s is not None
                self._is_asked = False
            if is_wanted:
                begun = time.monotonic()
                reading = self._read(self._uuid)
                self._told(Read(self._uuid, begun, time.monotonic(), reading))


class Readers:
    """All readers, and what they have read since it was last taken."""

    def __init__(self) -> None:
        """Open NVML in a thread of its own; nothing here waits for it."""
        self._news: queue.SimpleQueue[Opened | Read] = queue.SimpleQueue()
        self._readers: dict[str, _Reader] = {}
        self._nvml: Nvml | None = None
        self.descriptor, self._wake = os.pipe()
        os.set_blocking(self.descriptor, False)
        os.set_blocking(self._wake, False)
        threading.Thread(target=self._open, name="opens NVML", daemon=True).start()

    def _open(self) -> None:
        try:
            self._nvml = nvml = Nvml()
            self._tell(Opened(tuple(nvml.devices()), ""))
        except NoGpuSupport as error:
            self._tell(Opened((), str(error), is_absent=error.is_absent))
        except Exception as error:  # noqa: BLE001 - whoever waits for a lease must be told, whatever it is
            self._tell(Opened((), f"NVML failed: {type(error).__name__}: {error}"))

    def _tell(self, news: Opened | Read) -> None:
        self._news.put(news)
        try:
            os.write(self._wake, b"n")
        except BlockingIOError:
            return  # it is full, so whoever reads it will wake up

    def take(self) -> list[Opened | Read]:
        """Take what is new, in order; `descriptor` is readable when there is something."""
        try:
            while os.read(self.descriptor, 4096):
                pass
        except BlockingIOError:
            pass
        return [self._news.get() for _ in range(self._news.qsize())]

    def ask(self, uuid: str) -> None:
        """Have a device read once, soon."""
        self._reader(uuid).ask()

    def every(self, uuid: str, interval_s: float | None) -> None:
        """Have a device read every `interval_s` seconds; None: no more."""
        if interval_s is not None or uuid in self._readers:
            self._reader(uuid).every(interval_s)

    def _reader(self, uuid: str) -> _Reader:
        if uuid not in self._readers:
            self._readers[uuid] = _Reader(uuid, self._read, self._tell)
        return self._readers[uuid]

    def _read(self, uuid: str) -> Reading | Fault:
        if self._nvml is None:
            return Fault("unknown", "NVML is not there")
        try:
            return self._nvml.read(uuid)
        except Exception as error:  # noqa: BLE001 - the thread must live on: without readings nobody is given a device
            return Fault("unknown", f"NVML failed: {type(error).__name__}: {error}")
