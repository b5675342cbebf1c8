"""GPUs for tests: the stand-in, in a directory of its own, or this machine's own."""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING

import pytest
from gpu.machine import IS_REAL, Machine, RealMachine, Standin, build

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the stand-in for libnvidia-ml.so.1."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler (cc) for the stand-in of NVIDIA's library")
    return build(tmp_path_factory.mktemp("library"))


@pytest.fixture
def standin(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Standin:
    """Give a machine whose two GPUs are scripted. The library lies beside its state, which is how it finds that."""
    if IS_REAL:
        pytest.skip("what this tests cannot be had from real devices")
    folder = tmp_path / "nvml"
    machine = Standin(folder, tmp_path / "state")
    shutil.copy(library, folder)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))
    monkeypatch.setenv("STANDIN_NVML", str(folder))
    monkeypatch.setenv("HARNESS_STATE_DIR", str(machine.state_dir))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return machine


@pytest.fixture
def machine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Give a machine with GPUs: this one's where HARNESS_TEST_GPUS=real says so, else the stand-in."""
    if not IS_REAL:
        found: Machine = request.getfixturevalue("standin")
        return found
    state_dir = tmp_path / "state"
    monkeypatch.setenv("HARNESS_STATE_DIR", str(state_dir))
    return RealMachine(state_dir)


@pytest.fixture
def stranger(machine: Machine) -> Iterator[Callable[[str, int], subprocess.Popen[bytes]]]:
    """Give a function that starts a process from outside which holds memory on a device."""
    with contextlib.ExitStack() as stack:

        def start(uuid: str, mib: int) -> subprocess.Popen[bytes]:
            process = stack.enter_context(machine.stranger(uuid, mib))
            stack.callback(process.kill)
            return process

        yield start
