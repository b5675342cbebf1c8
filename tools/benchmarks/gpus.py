"""Servers that hold memory of a GPU: what is still in use when a stop returns, and suites that share a device."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pynvml

import harness
from tools.benchmarks import ways
from tools.benchmarks.processes import MILLISECONDS, run_pytest
from tools.benchmarks.rows import LIMIT, OURS, Row
from tools.benchmarks.runs import CASE, PLUGINS, Plan, measured, running
from tools.gpu_sampling import SLACK_BYTES, Sampler

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tools.benchmarks.rows import Settings

_MIB = 8192
# Its CUDA context is in use as well.
_SHARE_MIB = _MIB + 2048
_GIB = 1 << 30
_ROUNDS = 7
_TESTS = 8
# The field's ways wait 120 s for the memory of all devices; the first of several always waits to that limit.
_FIELD_S = 5.0
_BACK_S = 0.5
_ENVIRONMENT = {"BENCH_GPU_MIB": str(_SHARE_MIB), "BENCH_MEMORY_LIMIT_S": str(_FIELD_S)}


def stop(settings: Settings) -> list[Row]:
    """Stop two servers, each of which has a process that holds 8 GiB of device and 2 GiB of pinned host memory.

    An independent process reads the device's memory 1,000 times a second, and says when it was back.
    """
    uuid = _first_device()
    found: dict[str, list[tuple[float, float]]] = {}

    def measure(scratch: Path, plan: Plan) -> float:
        found.setdefault(plan.way, []).append(_stopped(scratch, plan, uuid))
        return 0.0

    plan = Plan("", 2, stop_s=0.2, options=(f"gpu={_MIB}",))
    measured(settings.scratch, plan, (OURS, *ways.PEERS, "kill alone"), settings.choose(_ROUNDS, 1), measure)
    gib = {way: [one for one, _ in pairs] for way, pairs in found.items()}
    late_ms = {way: [one for _, one in pairs] for way, pairs in found.items()}
    field = f"The field's wait for memory was cut from 120 s to {_FIELD_S:.0f} s"
    return [
        Row("memory in use when the stop of 2 servers returns", "GiB", gib | {LIMIT: [0.0]}, f"none. {field}", 1.0),
        Row(
            "that stop returns after the memory is back (negative: before)",
            "ms",
            late_ms | {LIMIT: [0.0]},
            "the first reading of the sampler that shows it",
            float("inf"),
        ),
    ]


def _stopped(scratch: Path, plan: Plan, uuid: str) -> tuple[float, float]:
    """Give the GiB that were in use when the stop returned, and how many ms that was after the memory was back."""
    with Sampler(uuid) as sampler, running(scratch, plan, **_ENVIRONMENT) as run:
        returned: float = run.told()["returned"]
        run.ends.wait()
        time.sleep(_BACK_S)  # memory that is back may be taken again by what was left
    moment = sampler.freed(sampler.base + SLACK_BYTES)
    if not moment.is_free or moment.held is None:
        raise RuntimeError(f"{plan}: the memory was never held, or never came back")
    held_bytes = max(0.0, sampler.used_at(returned) - sampler.base)
    is_early = moment.is_after(returned)
    return held_bytes / _GIB if is_early else 0.0, (returned - moment.at) * MILLISECONDS


def suite(settings: Settings) -> list[Row]:
    """Run 8 tests that each start a server with 8 GiB of one device, use it for 1 s, and stop it."""
    plan = Plan("", 1, stop_s=0.0, options=(f"gpu={_MIB}",), tests=_TESTS, uses_s=1.0, is_watched=False)
    runs: Mapping[str, tuple[str, Sequence[str]]] = {
        OURS: ("harness", ("-n4",)),
        LIMIT: ("limit", ("-n4",)),
        "one by one": ("one by one", ()),
    }
    samples: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(settings.choose(_ROUNDS, 1)):
        for way, (name, options) in runs.items():
            samples[way].append(_suite_s(settings.scratch, replace(plan, way=name), options))
    limit = "the same with -n 4, without leases and baselines"
    with Sampler(_first_device()) as sampler:  # apart from the rounds, which it would slow down
        _suite_s(settings.scratch, replace(plan, way=LIMIT), ("-n4",))
    reason = (
        "each baseline and each verdict is a reading of the device, and the driver answers nobody while it starts or"
        " tears down a neighbour's process: without leases the longest of an independent sampler's readings took"
        f" {sampler.figures()['sampler_longest_reading_ms']:.0f} ms. And {_lease_cost(settings)}"
    )
    return [Row(f"a suite of {_TESTS} tests on one device, -n 4", "s", samples, limit, 1.5, reason)]


def _lease_cost(settings: Settings) -> str:
    """Measure what leases add to launches, and NVML alone."""
    with harness.Watchdog(state_dir=settings.scratch / "state") as watchdog:
        plain_s = statistics.median(_launch_s(watchdog, None) for _ in range(_ROUNDS))
        first_s = _launch_s(watchdog, _SHARE_MIB)
        later_s = statistics.median(_launch_s(watchdog, _SHARE_MIB) for _ in range(_ROUNDS))
    code = "import time; b = time.monotonic(); import pynvml; pynvml.nvmlInit(); print(time.monotonic() - b)"
    nvml_s = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    return (
        f"each worker's first lease starts its broker, which reads the device, and takes {first_s:.2f} s (a launch"
        f" without a lease {plain_s:.3f} s); NVML's start alone takes {nvml_s:.2f} s, in a process of its own since"
        f" it may hang. A later lease takes {later_s:.3f} s."
    )


def _launch_s(watchdog: harness.Watchdog, share_mib: int | None) -> float:
    began = time.monotonic()
    server = watchdog.launch(["sleep", "1000"], gpu_memory_mib=share_mib)
    took_s = time.monotonic() - began
    server.kill()
    return took_s


def _suite_s(scratch: Path, plan: Plan, options: Sequence[str]) -> float:
    with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
        plugin = PLUGINS.get(plan.way, "none")
        names = {**_ENVIRONMENT, "BENCH_PLAN": json.dumps(asdict(plan)), "BENCH_TOLD": f"{folder}/told"}
        return run_pytest(Path(folder), CASE, *options, plugin=plugin, PYTHONWARNINGS="ignore", **names)


def _first_device() -> str:
    pynvml.nvmlInit()
    uuid: str = pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(0))
    return uuid
