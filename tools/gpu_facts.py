"""What the rules rely on, asked of the real driver: accounting, CUDA_VISIBLE_DEVICES, PID namespaces."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from harness.broker.nvml import Nvml
from harness.broker.readings import Reading
from harness.broker.visible import VisibilityError, visible
from tools.gpu_scenarios import stranger

_CUDA = """
import ctypes, uuid
cuda = ctypes.CDLL("libcuda.so.1")
count = ctypes.c_int()
if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
    count.value = 0
found = []
for ordinal in range(count.value):
    device, name = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    cuda.cuDeviceGet(ctypes.byref(device), ordinal)
    cuda.cuDeviceGetUuid_v2(ctypes.byref(name), device)
    found.append("GPU-" + str(uuid.UUID(bytes=bytes(name))))
print(",".join(found))
"""


def _cuda_sees(variable: str | None) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if variable is not None:
        environment["CUDA_VISIBLE_DEVICES"] = variable
    done = subprocess.run([sys.executable, "-c", _CUDA], env=environment, capture_output=True, text=True, check=True)
    return [uuid for uuid in done.stdout.strip().split(",") if uuid]


def visibility() -> tuple[list[dict[str, Any]], list[str]]:
    """Compare what CUDA makes of values of CUDA_VISIBLE_DEVICES with what the harness does."""
    devices = Nvml().devices()
    first, last = devices[0].uuid, devices[-1].uuid
    values = [None, "", "0", "0,0", "1,0", "1", "-1", "0,-1,1", first, first[:12], "GPU-", f"0,{last}", f"{first},1"]
    values += ["GPU-00000000-dead", f"{first},GPU-dead,{last}", " 0", "0 ", "0,", ",0", "00", "0x0", "0abc", "no", "2"]
    values += [f"{first},{first}", f" {first}", first.upper(), first.removeprefix("GPU-"), "NoDevFiles", "+0"]
    rows, wrong = [], []
    for value in values:
        real = _cuda_sees(value)
        try:
            ours = [device.uuid for device in visible(devices, value, None)]
        except VisibilityError as error:
            ours = [str(error)]
        short = {uuid: f"#{index}" for index, uuid in enumerate(device.uuid for device in devices)}
        shown = (value or repr(value)).replace(first, "UUID0").replace(last, "UUID1")
        rows.append(
            {"value": shown, "cuda": [short.get(u, u) for u in real], "harness": [short.get(u, u) for u in ours]}
        )
        if real != ours:
            wrong.append(f"CUDA_VISIBLE_DEVICES={shown!r}: CUDA sees {rows[-1]['cuda']}, not {rows[-1]['harness']}")
    return rows, wrong


def accounting(uuid: str) -> dict[str, Any]:
    """Say what is in use beyond what the listed processes hold, while a process comes and goes."""
    nvml = Nvml()

    def unlisted() -> int:
        reading = nvml.read(uuid)
        assert isinstance(reading, Reading)
        return reading.used_bytes - sum(held or 0 for held in (reading.processes or {}).values())

    before = unlisted()
    with stranger(uuid, 4096) as other:
        during = unlisted()
        reading = nvml.read(uuid)
        listed = isinstance(reading, Reading) and other.pid in (reading.processes or {})
    other.wait()
    after = unlisted()
    return {
        "unlisted_before_mib": before >> 20,
        "unlisted_during_mib": during >> 20,
        "unlisted_after_mib": after >> 20,
        "own_pid_is_listed": listed,
    }


def namespace(uuid: str) -> dict[str, Any]:
    """Say what a process in a PID namespace of its own reads."""
    code = f"from harness.broker.nvml import Nvml; print(Nvml().read({uuid!r}).processes)"
    command = ["unshare", "--pid", "--mount-proc", "--fork", sys.executable, "-c", code]
    with stranger(uuid, 100):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"processes_in_a_pid_namespace": (done.stdout or done.stderr).strip()[-200:]}
