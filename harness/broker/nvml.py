"""Readings through NVML, the library that comes with NVIDIA's driver. Any call here may block in the driver.

Sources: NVML API Reference Guide; the source of nvidia-ml-py 13.615.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from harness.broker.readings import Device, Fault, Reading

if TYPE_CHECKING:
    from collections.abc import Callable

_Answer = TypeVar("_Answer")
_PAUSES_S = (0.001, 0.002, 0.004)
_MOST_LOOKS = 5
_NUMBERS = re.compile(r"(\d+)\.(\d+)")
_KINDS = ("Compute", "Graphics", "MPSCompute")


class NoGpuSupport(Exception):  # noqa: N818 - it is what is the matter
    """There is no GPU to be had here; the text says why, and what to do.

    `is_absent`: this machine has no NVIDIA driver, so nothing is out of order.
    """

    def __init__(self, text: str, *, is_absent: bool = False) -> None:
        """Take the text."""
        super().__init__(text)
        self.is_absent = is_absent


class Nvml:
    """NVML, initialised in this process."""

    def __init__(self) -> None:
        """Load and initialise the library; raises NoGpuSupport."""
        try:
            import pynvml  # noqa: PLC0415 - only this process needs it
        except ImportError:
            raise NoGpuSupport("the Python package nvidia-ml-py is not installed: pip install nvidia-ml-py") from None
        self._nvml: Any = pynvml
        self._pid = 0
        self._renewed_in = 0
        self._handles: dict[str, Any] = {}
        self._kinds_of_error()
        self._start()

    def _kinds_of_error(self) -> None:
        nvml = self._nvml
        self._missing = (nvml.NVML_ERROR_FUNCTION_NOT_FOUND, nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH)
        self._passing = {
            nvml.NVML_ERROR_TIMEOUT,
            nvml.NVML_ERROR_UNKNOWN,
            nvml.NVML_ERROR_INSUFFICIENT_SIZE,
            nvml.NVML_ERROR_NOT_READY,
            nvml.NVML_ERROR_MEMORY,
            nvml.NVML_ERROR_INSUFFICIENT_RESOURCES,
        }
        self._lost = {nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED, nvml.NVML_ERROR_IN_USE}
        self._untold = {nvml.NVML_ERROR_NO_PERMISSION, nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_NO_DATA}
        self._unknown_device = {nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_ERROR_INVALID_ARGUMENT}
        # The second is raised where the driver is older than the package; it is no NVMLError, and has no number.
        self._errors: tuple[Any, ...] = (nvml.NVMLError, getattr(nvml, "NVMLLibraryMismatchError", nvml.NVMLError))

    def _number(self, error: Any) -> int:
        number: int = getattr(error, "value", self._nvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return number

    def _start(self) -> None:
        try:
            self._again(self._nvml.nvmlInit)
        except self._errors as error:
            raise self._no_support(error) from None
        self._pid = os.getpid()
        self._handles = {}
        self._has_lists = self._knows_lists()

    def _knows_lists(self) -> bool:
        # Drivers 535.43 to 535.98 fill lists with longer rows than all others (nvitop #79): bytes would pass for pids.
        try:
            version = _NUMBERS.match(_text(self._again(self._nvml.nvmlSystemGetDriverVersion)))
        except self._errors:
            return True
        return version is None or not (535, 43) <= (int(version[1]), int(version[2])) < (535, 104)

    def _initialised(self, call: Callable[[], _Answer]) -> _Answer:
        """Call, and initialise first where that is lost: after a fork, and else once in a process."""
        if self._pid != os.getpid():
            self._start()
        try:
            return call()
        except self._errors as error:
            is_lost = self._number(error) == self._nvml.NVML_ERROR_UNINITIALIZED
            if not is_lost or self._renewed_in == os.getpid():
                raise
        self._renewed_in = os.getpid()
        self._start()
        return call()

    def _no_support(self, error: Any) -> NoGpuSupport:
        nvml = self._nvml
        number = self._number(error)
        if number == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            return NoGpuSupport(
                "this machine has no GPU that NVML knows: libnvidia-ml.so.1, which comes with NVIDIA's driver, is not"
                " found (in a container it has to be let in: --gpus, or NVIDIA_VISIBLE_DEVICES)",
                is_absent=True,
            )
        advice = {
            nvml.NVML_ERROR_DRIVER_NOT_LOADED: "NVIDIA's driver is not loaded: try nvidia-smi",
            nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "NVIDIA's library and its kernel driver are of two versions:"
            " reboot, or reload the driver",
            nvml.NVML_ERROR_FUNCTION_NOT_FOUND: "NVIDIA's driver is too old for NVML's initialisation",
        }
        return NoGpuSupport(advice.get(number, f"NVML cannot be initialised: {error}"))

    def close(self) -> None:
        """Let go of NVML."""
        try:
            self._nvml.nvmlShutdown()
        except self._errors:
            return  # it is not initialised any more

    # ---- devices

    def devices(self) -> list[Device]:
        """Give the devices in the order of the bus; a GPU in MIG mode gives way to its instances.

        Raises NoGpuSupport if even their number is not told. A device that cannot be named is left out.
        """
        try:
            return self._initialised(self._devices)
        except self._errors as error:
            raise NoGpuSupport(f"NVML does not say which GPUs there are: {error}") from None

    def _devices(self) -> list[Device]:
        count: int = self._again(self._nvml.nvmlDeviceGetCount)
        return [device for index in range(count) for device in self._devices_at(index)]

    def _devices_at(self, index: int) -> list[Device]:
        nvml = self._nvml
        try:
            handle = self._again(nvml.nvmlDeviceGetHandleByIndex, index)
            device = self._device(handle, Device("", index, "GPU", 0))
            if not self._is_in_mig_mode(handle):
                return [device]
            places = self._again(nvml.nvmlDeviceGetMaxMigDeviceCount, handle)
        except self._errors:
            return []
        return [found for place in range(places) for found in self._instances_at(handle, place, device)]

    def _instances_at(self, handle: Any, place: int, parent: Device) -> list[Device]:
        try:
            instance = self._again(self._nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, place)
            return [self._device(instance, replace(parent, parent=parent.uuid))]
        except self._errors:
            return []  # no instance has been made there

    def _is_in_mig_mode(self, handle: Any) -> bool:
        try:
            current, _pending = self._again(self._nvml.nvmlDeviceGetMigMode, handle)
        except self._errors:
            return False  # this kind of GPU has no such mode
        return bool(current == self._nvml.NVML_DEVICE_MIG_ENABLE)

    def _device(self, handle: Any, known: Device) -> Device:
        """Name a device; it must have a UUID, and what else is not told is as `known`."""
        uuid = _text(self._again(self._nvml.nvmlDeviceGetUUID, handle))
        self._handles[uuid] = handle
        name, total_bytes = known.name, 0
        with suppress(*self._errors):
            name = _text(self._again(self._nvml.nvmlDeviceGetName, handle))
        with suppress(*self._errors):
            total_bytes = self._memory(handle).total_bytes
        return replace(known, uuid=uuid, name=name, total_bytes=total_bytes)

    # ---- readings

    def read(self, uuid: str) -> Reading | Fault:
        """Read a device's memory and processes, as of one moment."""
        try:
            return self._initialised(lambda: self._read(self._handle(uuid)))
        except NoGpuSupport as error:
            return Fault("unknown", str(error))
        except self._errors as error:
            self._handles.pop(uuid, None)  # a device that comes back may have another
            return self._fault(uuid, error)

    def _handle(self, uuid: str) -> Any:
        handle = self._handles.get(uuid)
        if handle is None:
            handle = self._handles[uuid] = self._again(self._nvml.nvmlDeviceGetHandleByUUID, uuid)
        return handle

    def _fault(self, uuid: str, error: Any) -> Fault:
        number = self._number(error)
        if number in self._lost:
            return Fault("lost", f"{error}")
        if number in self._unknown_device:
            return Fault("unknown", f"there is no such device: {uuid}")
        return Fault("unknown", f"{error}")

    def _read(self, handle: Any) -> Reading:
        # Memory and processes are two calls: they are of one moment if the list is the same before and after.
        before = self._processes(handle)
        for _ in range(_MOST_LOOKS):
            memory = self._memory(handle)
            after = self._processes(handle)
            if after == before:
                break
            before = after
        return Reading(memory.used_bytes, memory.total_bytes, memory.version, after)

    def _memory(self, handle: Any) -> Reading:
        nvml = self._nvml
        try:
            memory = self._again(nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
            return Reading(memory.used, memory.total, 2, None)
        except self._errors as error:
            if self._number(error) not in self._missing:
                raise
        memory = self._again(nvml.nvmlDeviceGetMemoryInfo, handle)
        return Reading(memory.used, memory.total, 1, None)

    def _processes(self, handle: Any) -> dict[int, int | None] | None:
        """Give every process that uses the device; None if that is not told."""
        if not self._has_lists:
            return None
        found: dict[int, int | None] = {}
        for kind in _KINDS:
            rows = self._listed(kind, handle)
            if rows is None:
                return None
            for pid, held in rows:
                known = found.get(pid)
                # One that computes and draws is in two lists, with all that it holds.
                found[pid] = held if known is None else max(known, held or 0)
        return found

    def _listed(self, kind: str, handle: Any) -> list[tuple[int, int | None]] | None:
        # Where there is nothing but compute, its list is all; without that of compute there is none.
        unsupported: list[tuple[int, int | None]] | None = None if kind == "Compute" else []
        for version in ("_v3", "_v2"):
            ask = getattr(self._nvml, f"nvmlDeviceGet{kind}RunningProcesses{version}", None)
            if ask is None:
                continue
            try:
                return [(row.pid, row.usedGpuMemory) for row in self._again(ask, handle)]
            except self._errors as error:
                number = self._number(error)
                if number in self._untold:
                    return unsupported if number == self._nvml.NVML_ERROR_NOT_SUPPORTED else None
                if number not in self._missing:
                    raise
        return unsupported

    def _again(self, call: Callable[..., _Answer], *arguments: Any) -> _Answer:
        """Call, and call again after a pause where the error is one that passes."""
        for pause_s in _PAUSES_S:
            try:
                return call(*arguments)
            except self._nvml.NVMLError as error:
                if error.value not in self._passing:
                    raise
            time.sleep(pause_s)
        return call(*arguments)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
