"""Servers that come and go on real devices, and what the harness, the sampler and today's logic say of each."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness
from tools.gpu_polling import Polling, total_bytes
from tools.gpu_sampling import Sampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SERVER = Path(__file__).resolve().parents[1] / "tests" / "servers" / "gpu_server.py"
AFTER_S = 0.3


@dataclass
class Trial:
    """One scenario, once."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def command(mib: int, *options: str) -> list[str]:
    return [sys.executable, str(SERVER), "--port", "{port}", "--mib", str(mib), *options]


@contextlib.contextmanager
def stranger(uuid: str, mib: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process from outside that holds memory."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": uuid}
    arguments = [sys.executable, str(SERVER), "--mib", str(mib), "--say"]
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()


def judged(trial: Trial, sampler: Sampler, row: harness.DeviceRelease, base_bytes: float, polling: Polling) -> None:
    """Compare what was said of one device with the samples."""
    last_held, first_free = sampler.freed_between(base_bytes)
    figures = {
        "verdict": row.verdict,
        "peak_mib": row.peak_mib,
        "sampler_gap_ms": round(sampler.period_ms, 2),
    }
    if row.verdict != "freed" or row.freed_at is None:
        trial.wrong.append(f"verdict {row.verdict}, and the sampler says freed: {row}")
    else:
        figures["behind_sampler_ms"] = round((row.freed_at - first_free) * 1e3, 2)
        if row.freed_at <= last_held:
            trial.wrong.append(
                f"said free {(last_held - row.freed_at) * 1e3:.2f} ms before the last sample that was not"
            )
        if row.freed_at - first_free > 0.010:
            trial.wrong.append(f"said free {(row.freed_at - first_free) * 1e3:.1f} ms after the sampler")
    if polling.freed_at is None:
        figures["polling"] = "leak"
    else:
        figures["polling_behind_ms"] = round((polling.freed_at - first_free) * 1e3, 1)
    trial.figures.update(figures)


def stop_one(
    trial: Trial, state: str, uuid: str, servers: int, mib: int, *options: str, grace_s: float = 15.0, **named: Any
) -> None:
    """Launch servers on a device, stop them, and judge."""
    wanted = {"gpus": [uuid], **named}
    base = total_bytes()
    with Sampler(uuid) as sampler, harness.Watchdog(state_dir=state) as watchdog:
        before = time.monotonic()
        time.sleep(0.05)
        group = [
            watchdog.launch(
                command(mib, *options), name=f"server{n}", ready=harness.http_ok("/health"), grace_s=grace_s, **wanted
            )
            for n in range(servers)
        ]
        for server in group:
            server.wait_ready(timeout_s=60)
        began = time.monotonic()
        waiter = threading.Thread(target=lambda: watchdog.stop(group))
        waiter.start()
        report = watchdog.stop(group)
        returned = time.monotonic()
        waiter.join()
        polling = Polling(base)
        polling.start()
        polling.join()
        time.sleep(AFTER_S)
    base_bytes = sampler.at(before + 0.02)
    assert report.gpu is not None
    last = max(report.gpu.devices, key=lambda row: row.freed_at or 0.0)
    trial.figures["stop_ms"] = round((returned - began) * 1e3, 1)
    trial.figures["free_after_ms"] = round((sampler.freed_between(base_bytes)[1] - began) * 1e3, 1)
    if not report.gpu.is_freed:
        trial.wrong.append(f"not freed: {report.gpu}")
    judged(trial, sampler, last, base_bytes, polling)


def strangers(trial: Trial, state: str, uuid: str) -> None:
    """Have a tenant from outside come during our server's life, and stay."""
    base = total_bytes()
    with harness.Watchdog(state_dir=state) as watchdog:
        server = watchdog.launch(command(4096), gpus=[uuid], ready=harness.http_ok("/health")).wait_ready(60)
        with stranger(uuid, 4096):
            report = watchdog.stop([server])
            polling = Polling(base, limit_s=2.5)
            polling.start()
            polling.join()
    assert report.gpu is not None
    (row,) = report.gpu.devices
    trial.figures.update(
        verdict=row.verdict, foreign=len(row.foreign), polling="leak" if polling.freed_at is None else "freed"
    )
    if row.verdict != "freed" or len(row.foreign) != 1:
        trial.wrong.append(f"a stranger made a leak of ours: {row}")


def stranger_leaves(trial: Trial, state: str, uuid: str) -> None:
    """Have a tenant from outside leave while our server, which is asked to exit, holds its memory for 2 s more."""
    verdicts: list[str] = []
    with harness.Watchdog(state_dir=state) as watchdog, stranger(uuid, 6144) as other:
        base = total_bytes()
        server = watchdog.launch(
            command(4096, "--on-term", "ignore"), gpus=[uuid], ready=harness.http_ok("/health"), grace_s=2.0
        ).wait_ready(60)
        began = time.monotonic()
        stopper = threading.Thread(target=lambda: verdicts.append(str(watchdog.stop([server]).gpu)))
        stopper.start()
        other.kill()
        other.wait()
        time.sleep(0.5)
        polling = Polling(base, limit_s=1.0)
        polling.start()
        polling.join()
        is_held = server.is_alive
        stopper.join()
        assert server.outcome is not None
        (row,) = server.outcome.gpu
    said_free_s = (row.freed_at or 0.0) - began
    trial.figures.update(
        verdict=row.verdict, said_free_after_s=round(said_free_s, 3), polling_while_held=polling.freed_at is not None
    )
    if not is_held or row.verdict != "freed" or said_free_s < 2.0:
        trial.wrong.append(f"a stranger hid that our server held memory: {row}")


def _lease(owner: harness.Watchdog, uuid: str, granted: list[float]) -> None:
    group = owner.group("next", gpus=[uuid])
    group.lease_gpus()
    granted.append(time.monotonic())
    group.stop()


def hand_over(trial: Trial, state: str, uuid: str) -> None:
    """See that the next lease is granted when the memory is back, though the old server has not ended."""
    granted: list[float] = []
    with Sampler(uuid) as sampler:
        before = time.monotonic()
        time.sleep(0.05)
        with harness.Watchdog(state_dir=state) as one, harness.Watchdog(state_dir=state) as other:
            old = one.launch(
                command(8192, "--on-term", "free-then-linger:2", "--pinned-mib", "2048"),
                gpus=[uuid],
                ready=harness.http_ok("/health"),
                grace_s=30.0,
            ).wait_ready(120)
            waiter = threading.Thread(target=_lease, args=(other, uuid, granted))
            waiter.start()
            time.sleep(1.0)
            began = time.monotonic()
            report = one.stop([old])
            ended = time.monotonic()
            waiter.join(30)
            time.sleep(AFTER_S)
    last_held, first_free = sampler.freed_between(sampler.at(before + 0.02))
    assert report.gpu is not None
    trial.figures.update(
        free_after_ms=round((first_free - began) * 1e3, 1),
        granted_behind_sampler_ms=round((granted[0] - first_free) * 1e3, 1),
        old_ended_after_ms=round((ended - began) * 1e3, 1),
    )
    if granted[0] <= last_held:
        trial.wrong.append("the device was granted while its memory was held")
    if granted[0] >= ended:
        trial.wrong.append("the device was granted only when the old server had ended")


_SUITE = """
import os, subprocess, sys, time, pathlib
import pytest
import harness
import pynvml

pynvml.nvmlInit()

def used(uuid):
    return pynvml.nvmlDeviceGetMemoryInfo(
        pynvml.nvmlDeviceGetHandleByUUID(uuid), version=pynvml.nvmlMemory_v2).used

@pytest.mark.parametrize("number", range({tests}))
def test_alone(server_group, number):
    server = server_group.launch({command!r}, gpus=[{uuid!r}], ready=harness.http_ok("/health"), grace_s=5.0)
    server.wait_ready(timeout_s=60)
    held = used(server.gpus[0])
    assert {mib} <= held >> 20 <= {mib} + 1500, held
    pathlib.Path({folder!r}, f"up-{{number}}").write_text(str(server.pid))
    time.sleep({hold_s})
"""


def pytest_run(
    state: str, folder: Path, uuid: str, tests: int, hold_s: float, *options: str
) -> subprocess.Popen[bytes]:
    text = _SUITE.format(tests=tests, command=command(8192), uuid=uuid, mib=8192, hold_s=hold_s, folder=str(folder))
    (folder / "test_suite.py").write_text(text, encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\nharness_crash_grace_s = 1.0\n", encoding="utf-8")
    arguments = [sys.executable, "-m", "pytest", "-q", "-p", "harness.plugin", "-p", "no:cacheprovider", *options]
    return subprocess.Popen(
        [*arguments, str(folder)],
        cwd=folder,
        env={**os.environ, "HARNESS_STATE_DIR": state},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def workers(trial: Trial, state: str, uuid: str) -> None:
    """Four workers share one device by leases; each test sees its own server's memory alone."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        run = pytest_run(state, Path(folder), uuid, 8, 0.0, "-n", "4")
        output = run.communicate(timeout=180)[0].decode(errors="replace")
    trial.figures.update(seconds=round(time.monotonic() - began, 1), result=output.strip().splitlines()[-1])
    if run.returncode:
        trial.wrong.append(output[-2000:])


def killed(trial: Trial, state: str, uuid: str, find: Callable[[int], int], *options: str) -> None:
    """Kill a process of a run whose server holds memory: when is that back, and had by the next run."""
    with tempfile.TemporaryDirectory() as folder, Sampler(uuid) as sampler:
        before = time.monotonic()
        time.sleep(0.05)
        run = pytest_run(state, Path(folder), uuid, 1, 60.0, *options)
        up = Path(folder) / "up-0"
        while not up.exists() or not up.read_text(encoding="utf-8"):
            assert time.monotonic() - before < 60
            time.sleep(0.01)
        granted: list[float] = []
        with harness.Watchdog(state_dir=state) as other:
            waiter = threading.Thread(target=_lease, args=(other, uuid, granted))
            waiter.start()
            time.sleep(1.0)
            began = time.monotonic()
            os.kill(find(run.pid), 9)
            waiter.join(60)
            granted_at = granted[0]
        run.kill()
        run.communicate()
        time.sleep(AFTER_S)
    last_held, first_free = sampler.freed_between(sampler.at(before + 0.02), until=granted_at + AFTER_S)
    trial.figures.update(
        free_after_ms=round((first_free - began) * 1e3, 1),
        granted_behind_sampler_ms=round((granted_at - first_free) * 1e3, 1),
    )
    if granted_at <= last_held:
        trial.wrong.append("the device was granted while its memory was held")
