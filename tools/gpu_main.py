"""Runs the scenarios on real devices, and writes what was seen. Exit status 1: something was wrong, or never run."""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pynvml

from tools import gpu_facts, gpu_table
from tools.gpu_cases import cases
from tools.gpu_processes import PLAIN, ROOT, plugin_environment
from tools.gpu_trial import NotShown, Trial

if TYPE_CHECKING:
    from collections.abc import Callable

# Runs of pytest with leases take longest, and show the same each time.
_ONCE = "pytest -n 4"
_TRIAL_S = 120
_TESTS_S = 150
_NEED_NO_DEVICE = ("tests/gpu/test_gpu_store.py", "tests/gpu/test_gpu_tool.py")
_PINNED_MIB = 8192


class TooLong(Exception):  # noqa: N818 - it reads as what happened
    """A trial has not ended in its time."""


class Run:
    """One run of the tool: what it has seen so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out: Path = options.out
        self.only: list[str] = options.only
        self.repeats: int = options.repeats
        self.until = time.monotonic() + options.limit_s
        self.trials: list[Trial] = []
        self.content: dict[str, Any] = {"about": {}, "facts": {}, "trials": [], "wrong": [], "not_run": []}

    def is_wanted(self, name: str) -> bool:
        return not self.only or any(part in name for part in self.only)

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.content["trials"] = [dataclasses.asdict(trial) for trial in self.trials]
        (self.out / "gpu.json").write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        (self.out / "gpu.md").write_text(gpu_table.markdown(self.content, self.trials), encoding="utf-8")

    @staticmethod
    def attempt(name: str, ask: Callable[[], Any], wrong: list[str]) -> Any:
        """Give what it gives; what it raises is wrong, and it has a time to end in."""
        try:
            signal.alarm(_TRIAL_S)
            return ask()
        except Exception:  # noqa: BLE001 - the other scenarios go on, and this one is listed as wrong
            wrong.append(f"{name}: {traceback.format_exc()[-3000:]}")
            return None
        finally:
            signal.alarm(0)

    def trial(self, name: str, run: Callable[[Trial, str], None]) -> None:
        if time.monotonic() > self.until:
            self.content["not_run"].append(name)
            return
        trial = Trial(name)
        began = time.monotonic()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            self.attempt(name, lambda: _shown(run, trial, f"{folder}/state"), trial.wrong)
            if trial.wrong:
                logs = Path(folder).glob("state/runs/*/*.log")
                trial.logs = {path.name: path.read_text(errors="replace")[-1500:] for path in logs}
        trial.seconds = round(time.monotonic() - began, 1)
        self.trials.append(trial)
        self.content["wrong"] += [f"{name}: {text}" for text in trial.wrong]
        print(f"{trial.seconds:6.1f} s  {name}: {json.dumps(trial.figures)} {trial.not_shown}", *trial.wrong)
        print(*(f"    {log}: {text}" for log, text in trial.logs.items() if text), sep="\n", end="")
        self.write()

    def facts(self, uuid: str, *, has_cuda: bool) -> None:
        facts, wrong = self.content["facts"], self.content["wrong"]
        found, faults = self.attempt("accounting", lambda: gpu_facts.accounting(uuid), wrong) or ({}, [])
        facts.update(found)
        wrong += faults
        facts.update(self.attempt("namespace", lambda: gpu_facts.namespace(uuid), wrong) or {})
        facts["orders"] = self.attempt("orders", lambda: gpu_facts.orders(uuid, 4096, _PINNED_MIB), wrong) or []
        if has_cuda:
            rows, faults = self.attempt("visibility", gpu_facts.visibility, wrong) or ([], [])
            facts["CUDA_VISIBLE_DEVICES"] = rows
            wrong += faults
        print(json.dumps(facts, indent=1))
        self.write()

    def tests(self) -> None:
        """Run those tests of the harness that real devices can do."""
        command = [sys.executable, "-m", "pytest", "-q", "-rsfE", *PLAIN]
        log = self.out / "tests.txt"
        with plugin_environment(HARNESS_TEST_GPUS="real") as environment, log.open("wb") as output:
            try:
                done = subprocess.run(
                    [*command, "tests/gpu", *(f"--ignore={path}" for path in _NEED_NO_DEVICE)],
                    cwd=ROOT,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=_TESTS_S,
                    check=False,
                )
                status = done.returncode
            except subprocess.TimeoutExpired:
                status = -1
        result = log.read_text(errors="replace").strip().splitlines()[-1] if status >= 0 else f"no end in {_TESTS_S} s"
        self.content["facts"]["tests/gpu on these devices"] = result
        print(result)
        if status:
            self.content["wrong"].append(f"tests/gpu: {result} (see tests.txt)")
        self.write()


def _shown(run: Callable[[Trial, str], None], trial: Trial, state: str) -> None:
    try:
        run(trial, state)
    except NotShown as error:
        trial.not_shown = str(error)


def _about(handles: list[Any]) -> dict[str, Any]:
    return {
        "date": dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "devices": [pynvml.nvmlDeviceGetName(handle) for handle in handles],
        "total_mib": [pynvml.nvmlDeviceGetMemoryInfo(one, version=pynvml.nvmlMemory_v2).total >> 20 for one in handles],
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "user": os.geteuid(),
        "cpus": os.cpu_count(),
    }


def _too_long(*_: object) -> None:
    raise TooLong(f"it has not ended in {_TRIAL_S} s")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "harness-gpu-results")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], help="parts of names; also: facts, tests")
    parser.add_argument("--limit-s", type=float, default=400.0, help="no scenario begins later; the tests come last")
    parser.add_argument("--list", action="store_true", help="print the names, and do nothing")
    return parser.parse_args()


def main() -> int:
    options = _options()
    run = Run(options)
    signal.signal(signal.SIGALRM, _too_long)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends what has been started
    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    uuids = [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
    total_mib = pynvml.nvmlDeviceGetMemoryInfo(handles[0], version=pynvml.nvmlMemory_v2).total >> 20
    named = {name: case for name, case in cases(uuids, total_mib).items() if run.is_wanted(name)}
    if options.list:
        print("facts", *named, "tests", sep="\n")
        return 0
    run.content["about"] = _about(handles)
    print(json.dumps(run.content["about"]))
    if run.is_wanted("facts"):
        run.facts(uuids[0], has_cuda="STANDIN_NVML" not in os.environ)
    # One of each first: whatever the time allows, each has been seen.
    for number in range(options.repeats):
        for name, case in named.items():
            if number == 0 or _ONCE not in name:
                run.trial(name, case)
    if run.is_wanted("tests"):
        run.tests()
    run.write()
    wrong, not_run = run.content["wrong"], run.content["not_run"]
    print(f"{len(run.trials)} trials, not run: {len(not_run)}, wrong: {len(wrong)}", *wrong, sep="\n")
    print((run.out / "gpu.md").read_text(encoding="utf-8"))
    return 1 if wrong or set(not_run) - {trial.name for trial in run.trials} else 0


if __name__ == "__main__":
    raise SystemExit(main())
