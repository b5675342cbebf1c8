"""Readings through NVML, the library that comes with NVIDIA's driver. Any call here may block in the driver.

Sources: NVML API Reference Guide; the source of nvidia-ml-py 13.615.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, TypeVar

from harness.broker.readings import Device, Fault, Reading

if TYPE_CHECKING:
    from collections.abc import Callable

_Answer = TypeVar("_Answer")
_PAUSES_S = (0.001, 0.002, 0.004)
_MOST_LOOKS = 5
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
        # What is raised where the driver is older than the package; it is no NVMLError.
        self._mismatch: Any = getattr(nvml, "NVMLLibraryMismatchError", nvml.NVMLError)

    def _start(self) -> None:
        nvml = self._nvml
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            raise self._no_support(error) from None
        self._pid = os.getpid()
        self._handles = {}

    def _no_support(self, error: Any) -> NoGpuSupport:
        nvml = self._nvml
        if error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
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
        return NoGpuSupport(advice.get(error.value, f"NVML cannot be initialised: {error}"))

    def close(self) -> None:
        """Let go of NVML."""
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError:
            return  # it is not initialised any more

    # ---- devices

    def devices(self) -> list[Device]:
        """Give the devices in the order of the bus; a GPU in MIG mode gives way to its instances.

        Raises NoGpuSupport if even their number is not told. A device that cannot be named is left out.
        """
        try:
            count: int = self._again(self._nvml.nvmlDeviceGetCount)
        except self._errors as error:
            raise NoGpuSupport(f"NVML does not say which GPUs there are: {error}") from None
        return [device for index in range(count) for device in self._devices_at(index)]

    def _devices_at(self, index: int) -> list[Device]:
        nvml = self._nvml
        try:
            handle = self._again(nvml.nvmlDeviceGetHandleByIndex, index)
            device = self._device(handle, index, "")
        except self._errors:
            return []
        if not self._is_in_mig_mode(handle):
            return [device]
        places = range(self._again(nvml.nvmlDeviceGetMaxMigDeviceCount, handle))
        return [found for place in places for found in self._instances_at(handle, place, device)]

    def _instances_at(self, handle: Any, place: int, parent: Device) -> list[Device]:
        try:
            instance = self._nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
            return [self._device(instance, parent.index, parent.uuid)]
        except self._errors:
            return []  # no instance has been made there

    def _is_in_mig_mode(self, handle: Any) -> bool:
        try:
            current, _pending = self._nvml.nvmlDeviceGetMigMode(handle)
        except self._errors:
            return False  # this kind of GPU has no such mode
        return bool(current == self._nvml.NVML_DEVICE_MIG_ENABLE)

    def _device(self, handle: Any, index: int, parent: str) -> Device:
        uuid = _text(self._nvml.nvmlDeviceGetUUID(handle))
        name = _text(self._nvml.nvmlDeviceGetName(handle))
        self._handles[uuid] = handle
        try:
            total = self._memory(handle).total_bytes
        except self._errors:
            total = 0
        return Device(uuid, index, name, total, parent)

    # ---- readings

    @property
    def _errors(self) -> tuple[Any, ...]:
        return (self._nvml.NVMLError, self._mismatch)

    def read(self, uuid: str) -> Reading | Fault:
        """Read a device's memory and processes, as of one moment."""
        try:
            if self._pid != os.getpid():
                self._start()  # NVML's state does not outlive a fork
            return self._read(self._handle(uuid))
        except NoGpuSupport as error:
            return Fault("unknown", str(error))
        except self._errors as error:
            return self._fault(uuid, error)

    def _handle(self, uuid: str) -> Any:
        if uuid not in self._handles:
            self._handles[uuid] = self._again(self._nvml.nvmlDeviceGetHandleByUUID, uuid)
        return self._handles[uuid]

    def _fault(self, uuid: str, error: Any) -> Fault:
        number = getattr(error, "value", None)
        if number in self._lost:
            return Fault("lost", f"{error}")
        if number in self._unknown_device:
            return Fault("unknown", f"there is no such device: {uuid}")
        if number == self._nvml.NVML_ERROR_UNINITIALIZED:
            self._pid = 0  # the next reading begins anew
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
            if getattr(error, "value", self._missing[0]) not in self._missing:
                raise
        memory = self._again(nvml.nvmlDeviceGetMemoryInfo, handle)
        return Reading(memory.used, memory.total, 1, None)

    def _processes(self, handle: Any) -> dict[int, int | None] | None:
        """Give every process that uses the device; None if that is not told."""
        found: dict[int, int | None] = {}
        for kind in _KINDS:
            rows = self._listed(kind, handle)
            if rows is None and kind == "Compute":
                return None
            for pid, held in rows or ():
                known = found.get(pid)
                # One that computes and draws is in two lists, with all that it holds.
                found[pid] = held if known is None else max(known, held or 0)
        return found

    def _listed(self, kind: str, handle: Any) -> list[tuple[int, int | None]] | None:
        for version in ("_v3", "_v2"):
            ask = getattr(self._nvml, f"nvmlDeviceGet{kind}RunningProcesses{version}", None)
            if ask is None:
                continue
            try:
                return [(row.pid, row.usedGpuMemory) for row in self._again(ask, handle)]
            except self._errors as error:
                number = getattr(error, "value", self._missing[0])
                if number in self._untold:
                    return None
                if number not in self._missing:
                    raise
        return None

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
