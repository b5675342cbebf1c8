"""What the rules rely on, asked of the real driver: accounting, what vanishes when, CUDA's devices, PID namespaces."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pynvml

from harness.broker.nvml import Nvml
from harness.broker.readings import Reading
from harness.broker.visible import VisibilityError, visible
from tools.gpu_processes import stranger
from tools.gpu_sampling import SLACK_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
LONGEST_S = 20.0
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
    command = [sys.executable, "-c", _CUDA]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=LONGEST_S)
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
        shown = repr(value).replace(first, "UUID0").replace(last, "UUID1")
        rows.append(
            {"value": shown, "cuda": [short.get(u, u) for u in real], "harness": [short.get(u, u) for u in ours]}
        )
        if real != ours:
            wrong.append(f"CUDA_VISIBLE_DEVICES={shown}: CUDA sees {rows[-1]['cuda']}, not {rows[-1]['harness']}")
    return rows, wrong


def accounting(uuid: str) -> tuple[dict[str, Any], list[str]]:
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
        is_listed = isinstance(reading, Reading) and other.pid in (reading.processes or {})
    after = unlisted()
    figures = {"before_mib": before // MIB, "during_mib": during // MIB, "after_mib": after // MIB}
    moves = max(abs(during - before), abs(after - before))
    wrong = [f"what no process holds moves by {moves // MIB} MiB: {figures}"] if moves > SLACK_BYTES else []
    return {f"unlisted_{name}": value for name, value in figures.items()} | {"own_pid_is_listed": is_listed}, wrong


def order(uuid: str, number: signal.Signals, mib: int, *options: str) -> dict[str, Any]:
    """Say when, after a signal, a process has left the driver's list, its memory is back, and it has died.

    Each is the end of the first reading that shows it; `longest_reading_ms` says how exact that can be.
    """
    device = pynvml.nvmlDeviceGetHandleByUUID(uuid)

    def used() -> int:
        found: int = pynvml.nvmlDeviceGetMemoryInfo(device, version=pynvml.nvmlMemory_v2).used
        return found

    base = used()
    with stranger(uuid, mib, *options) as process:
        tests: dict[str, Callable[[], bool]] = {
            "unlisted_ms": lambda: (
                process.pid not in {one.pid for one in pynvml.nvmlDeviceGetComputeRunningProcesses(device)}
            ),
            "memory_back_ms": lambda: used() <= base + SLACK_BYTES,
            "died_ms": lambda: os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None,
        }
        assert not any(test() for test in tests.values()), "the process is not on the device"
        seen: dict[str, Any] = {"signal": number.name, "mib": mib, "options": " ".join(options)}
        longest = 0.0
        began = time.monotonic()
        process.send_signal(number)
        while time.monotonic() - began < LONGEST_S and not tests.keys() <= seen.keys():
            for name in tests.keys() - seen.keys():
                begun = time.monotonic()
                is_so = tests[name]()
                longest = max(longest, time.monotonic() - begun)
                if is_so:
                    seen[name] = round((time.monotonic() - began) * 1e3, 1)
            time.sleep(0.0005)
    return {**seen, "longest_reading_ms": round(longest * 1e3, 1)}


def orders(uuid: str, mib: int, pinned_mib: int) -> list[dict[str, Any]]:
    """Give the order for each signal, with and without pinned host memory."""
    return [
        order(uuid, number, mib, *options)
        for options in ((), ("--pinned-mib", str(pinned_mib)))
        for number in (signal.SIGTERM, signal.SIGKILL)
    ]


def namespace(uuid: str) -> dict[str, Any]:
    """Say what a process in a PID namespace of its own reads."""
    code = f"from harness.broker.nvml import Nvml; print(Nvml().read({uuid!r}).processes)"
    command = ["unshare", "--pid", "--mount-proc", "--fork", sys.executable, "-c", code]
    with stranger(uuid, 100):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONGEST_S)
    return {"processes_in_a_pid_namespace": (done.stdout or done.stderr).strip()[-200:]}
