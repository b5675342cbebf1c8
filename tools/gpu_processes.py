"""The processes that the scenarios are made of; whatever happens, each is ended with its context."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from tools.gpu_trial import NotShown

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
PLAIN = [part for name in ("cacheprovider", "benchmark", "randomly") for part in ("-p", f"no:{name}")]
SERVER = ROOT / "tests" / "servers" / "gpu_server.py"
_HOARDER = Path(__file__).with_name("gpu_hoarder.py")
_SUITE = """
import os, pathlib, time
import pynvml
import pytest
import harness

pynvml.nvmlInit()

def used_mib(uuid):
    device = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    return pynvml.nvmlDeviceGetMemoryInfo(device, version=pynvml.nvmlMemory_v2).used >> 20

@pytest.mark.parametrize("number", range({tests}))
def test_alone(server_group, number):
    server = server_group.launch({command!r}, gpus=[{uuid!r}], ready=harness.http_ok("/health"), grace_s=5.0)
    server.wait_ready(timeout_s=60)
    held = used_mib(server.gpus[0])
    assert {mib} <= held <= {mib} + {room_mib}, held
    pathlib.Path({folder!r}, f"up-{{number}}").write_text(str(server.pid))
    time.sleep({hold_s})
"""
# A server of a suite holds this, and with its CUDA context at most so much more.
SUITE_MIB = 8192
ROOM_MIB = 1500


def command(mib: int, *options: str) -> list[str]:
    return [sys.executable, str(SERVER), "--port", "{port}", "--mib", str(mib), *options]


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _says(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@contextlib.contextmanager
def stranger(uuid: str, mib: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Give a process from outside that holds memory."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": uuid}
    arguments = [sys.executable, str(SERVER), "--mib", str(mib), "--say", *options]
    with _ended(subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE)) as process:
        assert _says(process) == b"held"
        yield process


@contextlib.contextmanager
def hoarder(pid: int) -> Iterator[subprocess.Popen[bytes]]:
    """Give a process from outside that keeps the device memory of another beyond that one's end."""
    arguments = [sys.executable, str(_HOARDER), str(pid)]
    with _ended(subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)) as process:
        if _says(process) != b"kept":
            raise NotShown("no descriptor of the server can be copied")
        try:
            yield process
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=10)  # it gives the memory back when its standard input ends


@contextlib.contextmanager
def plugin_environment(**more: str) -> Iterator[dict[str, str]]:
    """Give an environment in which pytest finds the plugin, also where the project is not installed."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        if not any(entry.value == "harness.plugin" for entry in metadata.entry_points(group="pytest11")):
            found = Path(folder, "harness_from_here-0.dist-info")
            found.mkdir()
            (found / "METADATA").write_text("Metadata-Version: 2.1\nName: harness-from-here\nVersion: 0\n")
            (found / "entry_points.txt").write_text("[pytest11]\nharness = harness.plugin\n")
            paths.insert(0, folder)
        yield {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


@contextlib.contextmanager
def pytest_run(
    state: str, uuid: str, tests: int, hold_s: float, *options: str
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Give a run of a suite whose tests each launch a server, and a folder that gets a file for each server."""
    with tempfile.TemporaryDirectory() as name, plugin_environment(HARNESS_STATE_DIR=state) as environment:
        folder = Path(name)
        values = {"tests": tests, "uuid": uuid, "hold_s": hold_s, "folder": name, "mib": SUITE_MIB}
        text = _SUITE.format(command=command(SUITE_MIB), room_mib=ROOM_MIB, **values)
        (folder / "test_suite.py").write_text(text, encoding="utf-8")
        (folder / "pytest.ini").write_text("[pytest]\nharness_crash_grace_s = 1.0\n", encoding="utf-8")
        arguments = [sys.executable, "-m", "pytest", "-q", *PLAIN, *options]
        process = subprocess.Popen(
            [*arguments, name], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        with _ended(process) as run:
            yield run, folder
