"""Runs the scenarios on real devices, and writes what was seen. Exit status 1: something was wrong."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pynvml

import harness
from harness import procfs
from tools import gpu_facts, gpu_table
from tools import gpu_scenarios as scenarios
from tools.gpu_scenarios import Trial

if TYPE_CHECKING:
    from collections.abc import Callable

_GIB = 1024


def _cases(uuids: list[str], total_mib: int) -> dict[str, Callable[[Trial, str], None]]:
    one = uuids[0]
    large = min(70 * _GIB, int(total_mib * 0.88))

    def stop(servers: int, mib: int, *options: str, **named: Any) -> Callable[[Trial, str], None]:
        return lambda trial, state: scenarios.stop_one(trial, state, one, servers, mib, *options, **named)

    pinned = ("--pinned-mib", str(16 * _GIB))
    ignore = ("--on-term", "ignore")
    cases: dict[str, Callable[[Trial, str], None]] = {
        "0 GiB": stop(1, 0),
        "20 GiB": stop(1, 20 * _GIB),
        "70 GiB": stop(1, large),
        "20 GiB, 16 GiB pinned": stop(1, 20 * _GIB, *pinned),
        "0 GiB, SIGTERM ignored": stop(1, 0, *ignore, grace_s=0.5),
        "20 GiB, SIGTERM ignored": stop(1, 20 * _GIB, *ignore, grace_s=0.5),
        "70 GiB, SIGTERM ignored": stop(1, large, *ignore, grace_s=0.5),
        "20 GiB, 16 GiB pinned, SIGTERM ignored": stop(1, 20 * _GIB, *pinned, *ignore, grace_s=0.5),
        "4 servers of 8 GiB on one device": stop(4, 8 * _GIB, gpu_memory_mib=12 * _GIB),
        "20 GiB, 3 processes": stop(1, 6 * _GIB, "--children", "2"),
        "a stranger comes": lambda trial, state: scenarios.strangers(trial, state, one),
        "a stranger leaves": lambda trial, state: scenarios.stranger_leaves(trial, state, one),
        "early hand-over": lambda trial, state: scenarios.hand_over(trial, state, one),
        "pytest -n 4 on one device": lambda trial, state: scenarios.workers(trial, state, one),
        "SIGKILL of pytest": lambda trial, state: scenarios.killed(trial, state, one, lambda pid: pid),
        "SIGKILL of a worker": lambda trial, state: scenarios.killed(trial, state, one, _worker, "-n", "1"),
    }
    if len(uuids) > 1:
        cases["2 devices, 20 GiB on each"] = lambda trial, state: scenarios.stop_one(
            trial, state, one, 1, 20 * _GIB, gpus=uuids[:2]
        )
    return cases


def _worker(controller: int) -> int:
    return procfs.children(controller)[0]  # a controller has no watchdog


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "harness-gpu-results")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], help="parts of names")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    pynvml.nvmlInit()
    found = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    uuids = [pynvml.nvmlDeviceGetUUID(handle) for handle in found]
    total_mib = pynvml.nvmlDeviceGetMemoryInfo(found[0], version=pynvml.nvmlMemory_v2).total >> 20
    about = {
        "date": dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "devices": [pynvml.nvmlDeviceGetName(handle) for handle in found],
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "user": os.geteuid(),
    }
    print(json.dumps(about))
    trials: list[Trial] = []
    facts: dict[str, Any] = {}
    wrong: list[str] = []
    if not options.only or "facts" in options.only:
        facts = {**gpu_facts.accounting(uuids[0]), **gpu_facts.namespace(uuids[0])}
        facts["CUDA_VISIBLE_DEVICES"], wrong = gpu_facts.visibility()
        print(json.dumps(facts, indent=1), *wrong, sep="\n")
    for name, run in _cases(uuids, total_mib).items():
        if not options.only or any(part in name for part in options.only):
            for _ in range(1 if "pytest -n" in name else options.repeats):
                trials.append(_once(name, run))
                wrong += [f"{name}: {text}" for text in trials[-1].wrong]
                _write(options.out, about, facts, trials, wrong)
    _write(options.out, about, facts, trials, wrong)
    print(f"{len(trials)} trials, wrong: {len(wrong)}", *wrong, sep="\n")
    return 1 if wrong else 0


def _once(name: str, run: Callable[[Trial, str], None]) -> Trial:
    trial = Trial(name)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            run(trial, f"{folder}/state")
        except (harness.HarnessError, AssertionError, OSError, StopIteration):
            trial.wrong.append(traceback.format_exc()[-3000:])
            logs = Path(folder).glob("state/runs/*/*.log")
            trial.wrong += [f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in logs]
    print(f"{time.monotonic() - began:6.1f} s  {name}: {json.dumps(trial.figures)} {trial.wrong or ''}")
    return trial


def _write(out: Path, about: dict[str, Any], facts: dict[str, Any], trials: list[Trial], wrong: list[str]) -> None:
    content = {"about": about, "facts": facts, "trials": [trial.__dict__ for trial in trials], "wrong": wrong}
    (out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (out / "gpu.md").write_text(gpu_table.markdown(about, facts, trials, wrong), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
