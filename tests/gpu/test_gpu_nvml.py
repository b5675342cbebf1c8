"""Readings through the real nvidia-ml-py, against a library whose answers are scripted.

The library is found when a process starts, and NVML's state is the process's: each test has a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import processes
import pytest
from gpu.machine import Standin, build

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_PROGRAM = Path(__file__).parent / "nvml_process.py"
MIB = 1 << 20
SOON_S = 10.0
ME = os.getpid()

UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, INSUFFICIENT_SIZE = 1, 2, 3, 4, 6, 7
DRIVER_NOT_LOADED, TIMEOUT, IRQ_ISSUE, FUNCTION_NOT_FOUND, GPU_IS_LOST, RESET_REQUIRED = 9, 10, 11, 13, 15, 16
LIB_RM_VERSION_MISMATCH, IN_USE, MEMORY, NO_DATA, INSUFFICIENT_RESOURCES = 18, 19, 20, 21, 23
ARGUMENT_VERSION_MISMATCH, NOT_READY, UNKNOWN = 25, 27, 999
PASSING = [UNKNOWN, TIMEOUT, INSUFFICIENT_SIZE, NOT_READY, MEMORY, INSUFFICIENT_RESOURCES]
LOST = [GPU_IS_LOST, RESET_REQUIRED, IN_USE]
UNTOLD = [NO_PERMISSION, NOT_SUPPORTED, NO_DATA]

INIT = "nvmlInitWithFlags"
MEMORY_V2, MEMORY_V1 = "nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetMemoryInfo"
COMPUTE, COMPUTE_V2 = "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2"
GRAPHICS, GRAPHICS_V2 = "nvmlDeviceGetGraphicsRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v2"
MPS, MPS_V2 = "nvmlDeviceGetMPSComputeRunningProcesses_v3", "nvmlDeviceGetMPSComputeRunningProcesses_v2"
BY_UUID, BY_INDEX = "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetHandleByIndex_v2"


class User:
    """A process that uses NVML."""

    def __init__(self, standin: Standin) -> None:
        self.standin = standin
        command = [sys.executable, str(_PROGRAM)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def call(self, *call: str) -> Any:
        """Have it call something; give the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(call).encode() + b"\n")
        self.process.stdin.flush()
        return self.next_answer()

    def next_answer(self) -> Any:
        """Give what it says next."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def reading(self, uuid: str) -> dict[str, Any]:
        """Give a reading, with the processes' pids as numbers."""
        return _reading(self.call("read", uuid))

    def fault(self, uuid: str) -> tuple[str, str]:
        """Give a fault's kind and text."""
        fault = self.call("read", uuid)["fault"]
        return fault["kind"], fault["text"]

    def devices(self) -> list[dict[str, Any]]:
        """Give the devices."""
        found: list[dict[str, Any]] = self.call("devices")["devices"]
        return found


def _reading(answer: Any) -> dict[str, Any]:
    reading: dict[str, Any] = answer["reading"]
    if reading["processes"] is not None:
        reading["processes"] = {int(pid): held for pid, held in reading["processes"].items()}
    return reading


@contextlib.contextmanager
def using(standin: Standin) -> Iterator[User]:
    """Have a process that uses NVML; it is not initialised yet."""
    user = User(standin)
    try:
        yield user
    finally:
        assert user.process.stdin is not None
        assert user.process.stdout is not None
        user.process.kill()
        user.process.wait()
        user.process.stdin.close()
        user.process.stdout.close()


@pytest.fixture
def user(standin: Standin) -> Iterator[User]:
    """Give a process that has initialised NVML. From then on calls are noted."""
    with using(standin) as found:
        assert found.call("open") == {"opened": True}
        standin.count_calls()
        yield found


@pytest.fixture
def gpu(standin: Standin) -> str:
    """Give the UUID of the first GPU."""
    return standin.uuids[0]


# ---- which devices there are


def test_devices_come_in_the_order_of_the_bus(user: User) -> None:
    uuids = ["GPU-ffff", "GPU-0000", "GPU-8888"]
    user.standin.set_devices([(uuid, f"name of {uuid}") for uuid in uuids], total_mib=1000)
    assert user.devices() == [
        {"uuid": uuid, "index": index, "name": f"name of {uuid}", "total_bytes": 1000 * MIB, "parent": ""}
        for index, uuid in enumerate(uuids)
    ]


def test_a_machine_without_devices_has_none(user: User) -> None:
    user.standin.set_devices([])
    assert user.devices() == []


def test_a_device_that_cannot_be_named_is_left_out_and_the_others_keep_their_indexes(user: User) -> None:
    first, second = user.standin.uuids
    user.standin.fail("any", GPU_IS_LOST, uuid=first)
    assert [(device["uuid"], device["index"]) for device in user.devices()] == [(second, 1)]


@pytest.mark.parametrize("function", [BY_INDEX, "nvmlDeviceGetUUID", "nvmlDeviceGetName", "nvmlDeviceGetMigMode"])
def test_a_fault_that_passes_hides_no_device(user: User, function: str) -> None:
    uuids = user.standin.uuids
    user.standin.fail(function, UNKNOWN, uuid=uuids[0], count=3)
    assert [device["uuid"] for device in user.devices()] == uuids


def test_a_device_without_a_name_is_a_device(user: User, gpu: str) -> None:
    user.standin.fail("nvmlDeviceGetName", NOT_SUPPORTED, uuid=gpu)
    assert [device["name"] for device in user.devices()] == ["GPU", "Stand-in H100"]


def test_a_device_whose_memory_is_not_told_is_a_device(user: User, gpu: str) -> None:
    user.standin.fail(MEMORY_V2, NOT_SUPPORTED, uuid=gpu)
    assert [device["total_bytes"] for device in user.devices()] == [0, 81920 * MIB]


@pytest.mark.parametrize("code", [NO_PERMISSION, UNKNOWN, UNINITIALIZED])
def test_without_the_number_of_devices_there_is_no_gpu_support(user: User, code: int) -> None:
    user.standin.fail("nvmlDeviceGetCount_v2", code)
    answer = user.call("devices")["no support"]
    assert answer["text"].startswith("NVML does not say which GPUs there are: ")
    assert not answer["is_absent"]


# ---- MIG


def with_instances(standin: Standin, count: int = 2) -> tuple[str, str, list[str]]:
    """Have the first of two GPUs in MIG mode; give it, the other, and its instances."""
    parent, other = standin.uuids
    instances = [f"MIG-{number:08x}-0000-4000-8000-000000000000" for number in range(count)]
    devices = [(parent, "Stand-in H100"), (other, "Stand-in H100")]
    standin.set_devices(devices, instances=[(uuid, parent) for uuid in instances])
    return parent, other, instances


def test_a_gpu_in_mig_mode_gives_way_to_its_instances(user: User) -> None:
    parent, other, instances = with_instances(user.standin)
    rows = [(device["uuid"], device["index"], device["name"], device["parent"]) for device in user.devices()]
    own = [(uuid, 0, "MIG 1g.10gb", parent) for uuid in instances]
    assert rows == [*own, (other, 1, "Stand-in H100", "")]


def test_instances_are_read_each_by_itself(user: User) -> None:
    _, _, instances = with_instances(user.standin)
    user.standin.hold(instances[1], ME, 100)
    assert user.reading(instances[0])["processes"] == {}
    reading = user.reading(instances[1])
    assert (reading["used_bytes"], reading["processes"]) == (100 * MIB, {ME: 100 * MIB})


def test_in_a_container_that_may_not_read_the_gpu_its_instances_are_there(user: User) -> None:
    parent, _, instances = with_instances(user.standin)
    user.standin.fail(MEMORY_V2, NO_PERMISSION, uuid=parent)
    assert [device["total_bytes"] for device in user.devices()[:2]] == [9728 * MIB] * 2
    assert user.reading(instances[0])["used_bytes"] == 0


def test_a_gpu_in_mig_mode_without_instances_is_no_device(user: User, gpu: str) -> None:
    user.standin.mark(f"mig.{gpu}")
    assert [device["uuid"] for device in user.devices()] == user.standin.uuids[1:]


def test_an_instance_without_a_name_has_its_gpus(user: User) -> None:
    _, _, instances = with_instances(user.standin, 1)
    user.standin.fail("nvmlDeviceGetName", NOT_SUPPORTED, uuid=instances[0])
    found, _ = user.devices()
    assert (found["uuid"], found["name"]) == (instances[0], "Stand-in H100")


@pytest.mark.parametrize("function", ["MigMode", "MaxMigDeviceCount", "MigDeviceHandleByIndex"])
def test_a_fault_that_passes_neither_hides_instances_nor_shows_their_gpu(user: User, function: str) -> None:
    parent, other, instances = with_instances(user.standin)
    user.standin.fail(f"nvmlDeviceGet{function}", TIMEOUT, uuid=parent, count=3)
    assert [device["uuid"] for device in user.devices()] == [*instances, other]


@pytest.mark.parametrize("function", ["MaxMigDeviceCount", "MigDeviceHandleByIndex"])
def test_a_gpu_that_does_not_tell_its_instances_hides_no_other(user: User, function: str) -> None:
    parent, other, _ = with_instances(user.standin)
    user.standin.fail(f"nvmlDeviceGet{function}", UNKNOWN, uuid=parent)
    assert [device["uuid"] for device in user.devices()] == [other]


@pytest.mark.parametrize("code", [NOT_SUPPORTED, FUNCTION_NOT_FOUND])
def test_a_gpu_that_does_not_know_mig_is_not_in_that_mode(user: User, code: int) -> None:
    user.standin.fail("nvmlDeviceGetMigMode", code)
    assert [device["uuid"] for device in user.devices()] == user.standin.uuids


# ---- memory


def test_a_reading_does_not_count_the_drivers_reserve(user: User, gpu: str) -> None:
    empty = {"used_bytes": 0, "total_bytes": 81920 * MIB, "version": 2, "processes": {}}
    assert user.reading(gpu) == empty
    user.standin.hold(gpu, ME, 300)
    user.standin.set_residue(gpu, 20)
    assert user.reading(gpu) == {**empty, "used_bytes": 320 * MIB, "processes": {ME: 300 * MIB}}
    assert user.reading(user.standin.uuids[1]) == empty


@pytest.mark.parametrize("code", [FUNCTION_NOT_FOUND, ARGUMENT_VERSION_MISMATCH])
def test_without_the_second_form_the_first_is_read_and_said_to_be(user: User, gpu: str, code: int) -> None:
    user.standin.fail(MEMORY_V2, code)
    reading = user.reading(gpu)
    assert (reading["used_bytes"], reading["version"]) == (480 * MIB, 1)


def test_an_older_library_that_lacks_the_newer_functions_is_read(standin: Standin, gpu: str) -> None:
    build(standin.folder, without=[MEMORY_V2, COMPUTE, GRAPHICS, MPS, MPS_V2, "nvmlDeviceGetMigMode"])
    standin.hold(gpu, ME, 100, "cg")
    with using(standin) as user:
        assert user.call("open") == {"opened": True}
        assert [device["uuid"] for device in user.devices()] == standin.uuids
        reading = user.reading(gpu)
    # The package's oldest version has no second form of the lists.
    told = {ME: 100 * MIB} if _has_second_lists() else None
    assert reading == {"used_bytes": 580 * MIB, "total_bytes": 81920 * MIB, "version": 1, "processes": told}


def _has_second_lists() -> bool:
    import pynvml  # noqa: PLC0415 - it says what this version of the package has, and nothing is initialised

    return hasattr(pynvml, COMPUTE_V2)


@pytest.mark.parametrize(
    ("functions", "version", "held_mib"), [(["nvmlDeviceGetMemoryInfo"], 1, 580), ([COMPUTE, GRAPHICS, MPS], 2, 100)]
)
def test_a_mismatch_of_versions_is_an_older_driver(
    user: User, gpu: str, functions: Sequence[str], version: int, held_mib: int
) -> None:
    for function in functions:
        if user.call("strict", function) == {"too old": True}:
            pytest.skip("this version of nvidia-ml-py has no NVMLLibraryMismatchError")
    for function in [MEMORY_V2] if version == 1 else functions:
        user.standin.mark(f"missing.{function}")
    user.standin.hold(gpu, ME, 100)
    reading = user.reading(gpu)
    assert (reading["version"], reading["used_bytes"]) == (version, held_mib * MIB)
    assert reading["processes"] == {ME: 100 * MIB}


def test_a_mismatch_of_versions_with_no_way_out_is_a_fault(user: User, gpu: str) -> None:
    if user.call("strict", "nvmlDeviceGetMemoryInfo") == {"too old": True}:
        pytest.skip("this version of nvidia-ml-py has no NVMLLibraryMismatchError")
    user.standin.mark(f"missing.{MEMORY_V2}")
    user.standin.mark(f"missing.{MEMORY_V1}")
    kind, text = user.fault(gpu)
    assert kind == "unknown"
    assert "does not match the NVML lib version" in text


@pytest.mark.parametrize("code", UNTOLD)
def test_memory_that_is_not_told_is_unknown_at_once(user: User, gpu: str, code: int) -> None:
    user.standin.fail(MEMORY_V2, code)
    assert user.fault(gpu)[0] == "unknown"
    assert user.standin.calls(MEMORY_V2) == [MEMORY_V2]
    assert user.standin.calls(MEMORY_V1) == []


# ---- processes


def test_processes_of_all_kinds_are_united(user: User, gpu: str) -> None:
    with contextlib.ExitStack() as stack:
        holders = [
            stack.enter_context(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
            for _ in range(4)
        ]
        for holder, kind in zip(holders, ["c", "g", "m", "cgm"], strict=True):
            stack.callback(holder.kill)
            user.standin.hold(gpu, holder.pid, 100, kind)
        reading = user.reading(gpu)
    assert reading["processes"] == {holder.pid: 100 * MIB for holder in holders}
    assert reading["used_bytes"] == 400 * MIB, "who is in several lists holds his memory once"


def test_what_is_not_told_of_a_process_is_none(user: User, gpu: str) -> None:
    user.standin.mark("untold")
    user.standin.hold(gpu, ME, 100, "cg")
    assert user.reading(gpu)["processes"] == {ME: None}


def test_in_a_namespace_the_list_is_empty_and_the_memory_told(user: User, gpu: str) -> None:
    user.standin.mark("blind")
    user.standin.hold(gpu, ME, 100)
    reading = user.reading(gpu)
    assert (reading["processes"], reading["used_bytes"]) == ({}, 100 * MIB)


@pytest.mark.parametrize("code", UNTOLD)
def test_without_the_list_of_compute_there_is_no_list(user: User, gpu: str, code: int) -> None:
    user.standin.hold(gpu, ME, 100)
    user.standin.fail(COMPUTE, code)
    reading = user.reading(gpu)
    assert (reading["processes"], reading["used_bytes"]) == (None, 100 * MIB)


@pytest.mark.parametrize("function", [GRAPHICS, MPS])
@pytest.mark.parametrize("code", [NO_PERMISSION, NO_DATA])
def test_a_list_that_is_kept_back_leaves_none(user: User, gpu: str, function: str, code: int) -> None:
    user.standin.fail(function, code)
    assert user.reading(gpu)["processes"] is None


@pytest.mark.parametrize("function", [GRAPHICS, MPS])
def test_a_kind_that_the_device_does_not_know_has_no_process(user: User, gpu: str, function: str) -> None:
    user.standin.hold(gpu, ME, 100)
    user.standin.fail(function, NOT_SUPPORTED)
    assert user.reading(gpu)["processes"] == {ME: 100 * MIB}


def test_without_any_form_of_a_list_only_compute_is_missed(user: User, gpu: str) -> None:
    user.standin.hold(gpu, ME, 100)
    for function in (GRAPHICS, GRAPHICS_V2, MPS, MPS_V2):
        user.standin.mark(f"missing.{function}")
    assert user.reading(gpu)["processes"] == {ME: 100 * MIB}
    for function in (COMPUTE, COMPUTE_V2):
        user.standin.mark(f"missing.{function}")
    assert user.reading(gpu)["processes"] is None


@pytest.mark.parametrize(
    ("version", "is_told"),
    [
        ("530.30.02", True),
        ("535.43", False),
        ("535.54.03", False),
        ("535.98", False),
        ("535.104.05", True),
        ("580.159.04", True),
        ("a strange one", True),
        (None, True),
    ],
)
def test_lists_of_a_driver_whose_rows_are_longer_are_not_believed(
    standin: Standin, gpu: str, version: str | None, *, is_told: bool
) -> None:
    if version is None:
        standin.fail("nvmlSystemGetDriverVersion", UNKNOWN)
    else:
        standin.set_driver(version)
    standin.hold(gpu, ME, 100)
    with using(standin) as user:
        user.call("open")
        reading = user.reading(gpu)
    assert reading["used_bytes"] == 100 * MIB
    assert reading["processes"] == ({ME: 100 * MIB} if is_told else None)


# ---- of one moment


def test_memory_is_read_between_two_equal_lists(user: User, gpu: str) -> None:
    user.reading(gpu)
    user.standin.count_calls()
    user.reading(gpu)
    lists = [COMPUTE, GRAPHICS, MPS]
    assert user.standin.calls() == [*lists, MEMORY_V2, *lists]


def test_who_comes_between_list_and_memory_is_in_both(user: User, gpu: str) -> None:
    user.standin.fail(MEMORY_V2, 0, uuid=gpu, count=1, seconds=60.0)
    assert user.call("begin", gpu) == {"begun": True}
    processes.wait_for(lambda: bool(user.standin.calls(MEMORY_V2)), SOON_S, "memory is being read")
    user.standin.hold(gpu, ME, 100)
    user.standin.mend(MEMORY_V2, gpu)
    reading = _reading(user.next_answer())
    assert (reading["used_bytes"], reading["processes"]) == (100 * MIB, {ME: 100 * MIB})
    assert len(user.standin.calls(MEMORY_V2)) == 2


def test_lists_that_never_agree_end_the_looking_all_the_same(user: User, gpu: str) -> None:
    user.standin.mark("restless")
    assert len(user.reading(gpu)["processes"]) == 1
    assert len(user.standin.calls(MEMORY_V2)) == 5


# ---- faults


@pytest.mark.parametrize("function", [MEMORY_V2, COMPUTE, BY_UUID])
@pytest.mark.parametrize("code", PASSING)
def test_a_fault_that_passes_is_asked_again(user: User, gpu: str, code: int, function: str) -> None:
    # With INSUFFICIENT_SIZE the package asks a second time by itself, with more room.
    user.standin.fail(function, code, uuid=gpu, count=6 if (code, function) == (INSUFFICIENT_SIZE, COMPUTE) else 3)
    user.reading(gpu)


@pytest.mark.parametrize("code", PASSING)
def test_a_fault_that_does_not_pass_is_unknown_after_three_more_times(user: User, gpu: str, code: int) -> None:
    user.standin.fail(MEMORY_V2, code, uuid=gpu)
    began = time.monotonic()
    assert user.fault(gpu)[0] == "unknown"
    assert time.monotonic() - began >= 0.007, "it waits 1, 2 and 4 ms"
    assert len(user.standin.calls(MEMORY_V2)) == 4


@pytest.mark.parametrize("function", [MEMORY_V2, COMPUTE, GRAPHICS, BY_UUID])
@pytest.mark.parametrize("code", LOST)
def test_a_lost_device_is_lost_at_once(user: User, gpu: str, code: int, function: str) -> None:
    user.standin.fail(function, code, uuid=gpu)
    assert user.fault(gpu)[0] == "lost"
    assert len(user.standin.calls(function, gpu)) == 1
    assert user.reading(user.standin.uuids[1])["used_bytes"] == 0


def test_a_device_that_was_lost_is_asked_for_anew(user: User, gpu: str) -> None:
    user.reading(gpu)
    user.standin.fail("any", GPU_IS_LOST, uuid=gpu)
    assert user.fault(gpu) == ("lost", "GPU is lost")
    user.standin.mend("any", gpu)
    user.standin.count_calls()
    user.reading(gpu)
    assert user.standin.calls(BY_UUID, gpu), "its handle may be of before"


@pytest.mark.parametrize("code", [NOT_FOUND, INVALID_ARGUMENT])
@pytest.mark.parametrize("function", [BY_UUID, MEMORY_V2])
def test_a_device_that_is_gone_is_said_to_be(user: User, gpu: str, code: int, function: str) -> None:
    user.standin.fail(function, code, uuid=gpu)
    assert user.fault(gpu) == ("unknown", f"there is no such device: {gpu}")


def test_a_device_that_never_was_is_said_to_be(user: User) -> None:
    assert user.fault("GPU-nobody") == ("unknown", "there is no such device: GPU-nobody")


@pytest.mark.parametrize("code", [IRQ_ISSUE, LIB_RM_VERSION_MISMATCH, 12345])
def test_any_other_error_is_unknown_with_its_text(user: User, gpu: str, code: int) -> None:
    user.standin.fail(MEMORY_V2, code, uuid=gpu)
    kind, text = user.fault(gpu)
    assert kind == "unknown"
    assert text
    assert len(user.standin.calls(MEMORY_V2)) == 1


def test_a_device_that_blocks_delays_no_other_and_answers_when_it_can(user: User) -> None:
    blocked, other = user.standin.uuids
    user.standin.fail("any", 0, uuid=blocked, count=1, seconds=60.0)
    user.call("begin", blocked)
    began = time.monotonic()
    assert user.call("begin", other) == {"begun": True}
    assert _reading(user.next_answer())["used_bytes"] == 0
    assert time.monotonic() - began < 5.0
    user.standin.hold(blocked, ME, 100)
    user.standin.mend("any", blocked)
    assert _reading(user.next_answer())["used_bytes"] == 100 * MIB


# ---- initialisation


def test_importing_costs_nothing() -> None:
    code = "import sys, harness.broker.nvml; sys.exit('pynvml' in sys.modules or 'ctypes' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("function", [BY_UUID, MEMORY_V2, COMPUTE])
def test_nvml_that_is_not_initialised_any_more_is_initialised_once_more(user: User, gpu: str, function: str) -> None:
    user.standin.fail(function, UNINITIALIZED, uuid=gpu, count=1)
    assert user.reading(gpu)["used_bytes"] == 0
    assert user.standin.calls(INIT) == [INIT]


def test_nvml_that_cannot_be_kept_is_initialised_once_more_and_not_for_ever(user: User, gpu: str) -> None:
    user.standin.fail(MEMORY_V2, UNINITIALIZED)
    for _ in range(4):
        assert user.fault(gpu) == ("unknown", "Uninitialized")
    assert user.standin.calls(INIT) == [INIT]


def test_closing_lets_go_of_nvml_and_closing_again_does_no_harm(user: User) -> None:
    assert user.call("close") == {"closed": True}
    assert user.standin.calls() == ["nvmlShutdown"]
    assert user.call("close") == {"closed": True}


@pytest.mark.parametrize("call", ["read", "devices"])
def test_a_forked_child_initialises_for_itself(user: User, gpu: str, call: str) -> None:
    user.reading(gpu)
    user.standin.count_calls()
    answer = user.call("child", *([call, gpu] if call == "read" else [call]))
    assert "reading" in answer or len(answer["devices"]) == 2, answer
    assert user.next_answer() == {"child ended": True}
    assert user.standin.calls()[0] == INIT, "the parent's handles are not tried first"
    assert user.standin.calls(INIT) == [INIT]
    assert user.standin.calls(BY_UUID, gpu) or call == "devices", "handles are the parent's"
    user.reading(gpu)
    assert user.standin.calls(INIT) == [INIT], "the parent's state is untouched"


def test_a_forked_child_that_cannot_initialise_has_a_fault(user: User, gpu: str) -> None:
    user.standin.fail(INIT, DRIVER_NOT_LOADED)
    fault = user.call("child", "read", gpu)["fault"]
    assert fault == {"kind": "unknown", "text": "NVIDIA's driver is not loaded: try nvidia-smi"}


NO_SUPPORT = [
    (DRIVER_NOT_LOADED, "NVIDIA's driver is not loaded: try nvidia-smi"),
    (LIB_RM_VERSION_MISMATCH, "NVIDIA's library and its kernel driver are of two versions: reboot, or reload"),
    (FUNCTION_NOT_FOUND, "NVIDIA's driver is too old"),
    (NO_PERMISSION, "NVML cannot be initialised: Insufficient Permissions"),
    (GPU_IS_LOST, "NVML cannot be initialised: GPU is lost"),
    (UNKNOWN, "NVML cannot be initialised: Unknown Error"),
]


@pytest.mark.parametrize(("code", "text"), NO_SUPPORT)
def test_nvml_that_cannot_be_initialised_says_why(standin: Standin, code: int, text: str) -> None:
    standin.fail(INIT, code)
    with using(standin) as user:
        answer = user.call("open")["no support"]
    assert answer["text"].startswith(text)
    assert not answer["is_absent"], "a driver is there, and something is out of order"


def test_a_library_too_old_to_be_initialised_says_so(standin: Standin) -> None:
    build(standin.folder, without=[INIT])
    with using(standin) as user:
        assert user.call("open")["no support"]["text"].startswith("NVIDIA's driver is too old")


def test_a_fault_that_passes_does_not_hinder_initialisation(standin: Standin) -> None:
    standin.fail(INIT, UNKNOWN, count=3)
    with using(standin) as user:
        assert user.call("open") == {"opened": True}


def test_without_the_library_there_is_no_gpu(standin: Standin) -> None:
    # An empty file, as containers have them: it hides a library that this machine may have.
    (standin.folder / "libnvidia-ml.so.1").write_bytes(b"")
    with using(standin) as user:
        answer = user.call("open")["no support"]
    assert answer["text"].startswith("this machine has no GPU that NVML knows: libnvidia-ml.so.1")
    assert answer["is_absent"]


def test_without_the_package_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['pynvml'] = None; import harness.broker.nvml as nvml; nvml.Nvml()"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stderr.strip().endswith(
        "NoGpuSupport: the Python package nvidia-ml-py is not installed: pip install nvidia-ml-py"
    )
