"""Which devices CUDA_VISIBLE_DEVICES lets a process see, and in which order. Pure.

Source: CUDA Programming Guide, "CUDA Environment Variables": the order of the entries is that of the devices, the
beginning of a UUID is enough if it is that of one GPU, an invalid entry hides what follows, an empty value hides all.
Numbers read as strtol does, entries of two kinds, and devices that are named twice: PyTorch knows of them
(`torch.cuda._parse_visible_devices` and its tests), and driver 580 was seen to do the same. MIG instances are known by
the UUIDs that NVML gives them, "MIG-<UUID>", before driver 470 "MIG-GPU-<UUID>/<GPU instance>/<compute instance>" (MIG
User Guide, "CUDA Device Enumeration").
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.broker.readings import Device

_BUS_ORDER = "PCI_BUS_ID"
_UUIDS = ("GPU-", "MIG-")
# As strtol(3) reads a number: spaces and a sign before it, and whatever after it.
_ORDINAL = re.compile(r"\s*\+?0*([0-9]+)", re.ASCII)
_MOST_DIGITS = 9


class VisibilityError(ValueError):
    """The devices that are meant cannot be told, or are not visible."""


def visible(devices: Sequence[Device], variable: str | None, order: str | None) -> list[Device]:
    """Give the devices that a process with these values of CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER sees.

    Without the variable it is all of them, and of MIG instances each, though CUDA itself uses one in a process. The
    first entry that is none, or that is of another kind (number, UUID) than the first of all, hides all that follow. A
    device that is named twice makes CUDA see none. Raises VisibilityError for numbers whose order is not known.
    """
    if variable is None:
        return list(devices)
    seen: list[Device] = []
    is_by_uuid = variable.startswith(_UUIDS)  # the first entry says of which kind all of them are
    for entry in variable.split(","):
        found = _by_uuid(devices, entry) if is_by_uuid else _by_ordinal(devices, entry, order)
        if found is None:
            break
        seen.append(found)
    return seen if len(set(seen)) == len(seen) else []


def _by_ordinal(devices: Sequence[Device], entry: str, order: str | None) -> Device | None:
    number = _ORDINAL.match(entry)
    if number is None or len(number[1]) > _MOST_DIGITS or int(number[1]) >= len(devices):
        return None
    _check_order(devices, order)
    return devices[int(number[1])]


def _check_order(devices: Sequence[Device], order: str | None) -> None:
    # How CUDA numbers GPUs beside MIG instances, of which it shows a process one alone, is written nowhere.
    if any(device.parent for device in devices):
        raise VisibilityError("CUDA_VISIBLE_DEVICES numbers GPUs, of which some are divided (MIG): name them by UUID")
    # CUDA numbers them with the fastest first unless it is told otherwise, and what it takes for fast is not known.
    if order != _BUS_ORDER and len({device.name for device in devices}) > 1:
        raise VisibilityError(
            "CUDA_VISIBLE_DEVICES numbers GPUs of several kinds, and their order is CUDA's own guess: set"
            " CUDA_DEVICE_ORDER=PCI_BUS_ID, or name them by UUID"
        )


def _by_uuid(devices: Sequence[Device], prefix: str) -> Device | None:
    found = [device for device in devices if device.uuid.upper().startswith(prefix.upper())]
    # "GPU-" alone names nobody, also where there is one device.
    is_name = prefix.startswith(_UUIDS) and prefix not in _UUIDS
    return found[0] if len(found) == 1 and is_name else None


def pick(seen: Sequence[Device], wanted: Sequence[int | str]) -> list[Device]:
    """Give the devices that are wanted: by index among the visible ones, or by UUID or a unique beginning of one.

    Raises VisibilityError for one that is not visible, or that is there twice.
    """
    chosen = [_wanted(seen, one) for one in wanted]
    if len(set(chosen)) < len(chosen):
        raise VisibilityError(f"gpus: a device is there twice: {', '.join(map(str, wanted))}")
    return chosen


def _wanted(seen: Sequence[Device], one: int | str) -> Device:
    found = _by_uuid(seen, one) if isinstance(one, str) else (seen[one] if 0 <= one < len(seen) else None)
    if found is None:
        there = ", ".join(f"{index} {device.uuid}" for index, device in enumerate(seen)) or "none"
        raise VisibilityError(f"gpus: {one} is not one of the GPUs that this process sees: {there}")
    return found
