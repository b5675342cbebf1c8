"""What other GPU tests stand on: servers that hold memory (on real devices too), and the stand-in of the library."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import processes
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gpu.machine import Machine, Standin

_SERVER = Path(__file__).parents[1] / "servers" / "gpu_server.py"
MIB = 200
SOON_S = 20.0
_TIMEOUT = 10


@pytest.fixture
def start(machine: Machine) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Give a function that starts a server, and gives it once it and its children hold memory."""
    with contextlib.ExitStack() as stack:

        def begin(*options: str, devices: str | None = None) -> subprocess.Popen[bytes]:
            visible = machine.uuids[0] if devices is None else devices
            command = [sys.executable, str(_SERVER), "--mib", str(MIB), "--say", *options]
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
            process = stack.enter_context(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
            assert process.stdout is not None
            stack.callback(lambda: _end(process.pid))
            assert process.stdout.readline() == b"held\n"
            return process

        yield begin


def _end(root: int) -> None:
    for who in processes.identities([*processes.tree(root), root]):
        if processes.is_running(who):
            os.kill(who.pid, signal.SIGKILL)


def holds(machine: Machine, mib: int, device: int = 0) -> bool:
    """Say whether so much is in use; on real devices each process has a context besides."""
    used_mib = machine.used_mib(machine.uuids[device])
    return used_mib < 64 if mib == 0 else used_mib >= mib


# ---- servers


def test_a_server_holds_memory_on_each_device_that_it_sees(
    machine: Machine, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    start(devices=",".join(machine.uuids))
    assert all(holds(machine, MIB, device) for device in range(len(machine.uuids)))


def test_a_server_that_sees_no_device_holds_nothing(
    standin: Standin, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    start(devices="")
    assert [standin.used_mib(uuid) for uuid in standin.uuids] == [0, 0]


def test_it_answers_once_it_holds_memory(machine: Machine, start: Callable[..., subprocess.Popen[bytes]]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    start("--port", str(port))
    processes.wait_for(lambda: _answers(port) == 200, SOON_S, "it is healthy")
    assert holds(machine, MIB)


def _answers(port: int) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            status: int = answer.status
            return status
    except urllib.error.URLError:
        return 0


def test_at_sigterm_it_ends_and_its_memory_is_back(
    machine: Machine, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = start()
    process.terminate()
    assert process.wait(SOON_S) == 0
    assert holds(machine, 0)


def test_one_that_ignores_sigterm_holds_on_until_it_is_killed(
    machine: Machine, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = start("--on-term", "ignore")
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    assert holds(machine, MIB)
    process.kill()
    process.wait()
    assert holds(machine, 0)


def test_one_that_lingers_has_freed_its_memory_and_its_childrens(
    machine: Machine, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = start("--on-term", "free-then-linger:60", "--children", "1")
    assert holds(machine, 2 * MIB)
    process.terminate()
    processes.wait_for(lambda: holds(machine, 0), SOON_S, "memory is back")
    assert process.poll() is None
    assert len(processes.tree(process.pid)) == 1


def test_children_hold_as_much_each_and_end_with_it(
    machine: Machine, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = start("--children", "2")
    children = processes.identities(processes.tree(process.pid))
    assert len(children) == 2
    assert holds(machine, 3 * MIB)
    process.terminate()
    assert process.wait(SOON_S) == 0
    assert not any(map(processes.is_running, children))
    assert holds(machine, 0)


# ---- the stand-in


def test_a_zombie_holds_nothing(standin: Standin, start: Callable[..., subprocess.Popen[bytes]]) -> None:
    process = start()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert processes.zombies(os.getpid()) == [process.pid]
    assert standin.used_mib(standin.uuids[0]) == 0


def test_somebody_else_with_the_same_pid_holds_nothing(standin: Standin) -> None:
    device = standin.uuids[0]
    standin.hold(device, os.getpid(), MIB)
    path = standin.folder / "holds" / f"{device}.{os.getpid()}"
    assert standin.used_mib(device) == MIB
    mib, kind, start_time, *rest = path.read_text(encoding="utf-8").split()
    path.write_text(" ".join([mib, kind, str(int(start_time) - 1), *rest]), encoding="utf-8")
    assert standin.used_mib(device) == 0


@pytest.mark.parametrize("is_listed", [True, False])
def test_memory_can_stay_for_a_time_after_the_end_listed_or_not(
    standin: Standin, start: Callable[..., subprocess.Popen[bytes]], *, is_listed: bool
) -> None:
    device = standin.uuids[0]
    process = start("--linger-ms", "4000", *(["--listed"] if is_listed else []))
    process.kill()
    process.wait()
    began = time.monotonic()
    assert standin.used_mib(device) == MIB
    assert _pids(device) == ([process.pid] if is_listed else [])
    processes.wait_for(lambda: standin.used_mib(device) == 0, SOON_S, "memory is back")
    assert time.monotonic() - began >= 3.9
    assert _pids(device) == []


def _pids(device: str) -> list[int]:
    code = f"from harness.broker.nvml import Nvml; print(*Nvml().read({device!r}).processes)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split()]


def test_a_fault_for_so_many_calls_is_for_so_many_whoever_calls(standin: Standin) -> None:
    nvml = ctypes.CDLL(str(standin.folder / "libnvidia-ml.so.1"))
    assert nvml.nvmlInitWithFlags(0) == 0
    count = ctypes.c_uint()
    standin.fail("nvmlDeviceGetCount_v2", _TIMEOUT, count=100)
    codes: list[int] = []

    def ask() -> None:
        codes.extend([nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) for _ in range(50)])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(codes) == {_TIMEOUT: 100, 0: 100}
    assert nvml.nvmlShutdown() == 0


def test_a_call_that_blocks_goes_on_when_it_is_mended_and_stays_mended(standin: Standin) -> None:
    nvml = ctypes.CDLL(str(standin.folder / "libnvidia-ml.so.1"))
    assert nvml.nvmlInitWithFlags(0) == 0
    count = ctypes.c_uint()
    codes: list[int] = []
    standin.fail("nvmlDeviceGetCount_v2", _TIMEOUT, count=5, seconds=60.0)
    standin.count_calls()
    thread = threading.Thread(target=lambda: codes.append(nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))))
    thread.start()
    processes.wait_for(lambda: bool(standin.calls()), SOON_S, "it blocks")
    assert not codes
    standin.mend("nvmlDeviceGetCount_v2")
    thread.join(SOON_S)
    assert codes == [_TIMEOUT]
    assert nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0
    assert nvml.nvmlShutdown() == 0
