"""The program of tools/chaos: runs trials side by side, prints the table, exits with 1 if the promise was broken."""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from harness import procfs
from tools import chaos_judge, chaos_plan, chaos_table, chaos_trial
from tools.chaos_bystanders import Bystanders
from tools.chaos_count import MarksPlace, Places
from tools.chaos_result import Around

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tools.chaos_result import Result

_JOBS_FOR_A_CORE = 2


class Run:
    """Everything that the trials of one run share."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Take the options; start the bystanders."""
        self._only = options.only
        self._is_quiet = options.json
        self._scratch = Path(tempfile.mkdtemp(prefix="chaos-"))
        self._lock = threading.Lock()
        self._limit_s = options.limit
        self._flaw = options.flaw
        self.places = Places(may_use_cgroups=not options.marks)
        self.bystanders = Bystanders(self._scratch / "bystander", self.places.bystanders())
        self.results: list[Result] = []
        # From here on: a busy machine may take longer for the bystanders than a short run has.
        self._until = time.monotonic() + options.seconds if options.seconds else None

    def trial(self, seed: int) -> None:
        """Run one trial, unless the time is over."""
        if self._until is not None and time.monotonic() >= self._until:
            return
        directory = self._scratch / f"t{seed}"
        plan = chaos_plan.plan(seed, self._only)
        around = Around(self.places, self.bystanders, self._limit_s, self._flaw)
        result = chaos_trial.run(plan, directory, around)
        shutil.rmtree(directory, ignore_errors=True)
        shutil.rmtree(directory.with_name(f"{directory.name}-sibling"), ignore_errors=True)
        with self._lock:
            self.results.append(result)
            if result.is_failure:
                print(self.describe(result), file=sys.stderr, flush=True)
            elif len(self.results) % 100 == 0:
                print(f"{len(self.results)} trials ...", file=sys.stderr, flush=True)

    def describe(self, result: Result) -> str:
        """Say what went wrong in a trial, and how to repeat it."""
        only = f" --only {self._only!r}" if self._only else ""
        only += f" --flaw {self._flaw}" if self._flaw else ""
        lines = [
            f"FAILED: {result.fault} x {result.target} at {result.step or 'an instant'}",
            f"  {result.workers or 'no'} workers",
            *(f"  error: {line}" for line in ([result.error] if result.error else [])),
            *(f"  survivor: {line}" for line in result.survivors),
            *(f"  {line}" for line in result.harmed),
            f"  repeat it: bash tools/chaos --trial {result.seed}{only}",
            *(f"  | {line}" for line in result.output.splitlines()),
        ]
        return "\n".join(lines)

    def strays(self) -> list[str]:
        """Give what is left of any trial outside of its cgroup, where its own judging did not look."""
        marked = MarksPlace(self._scratch, self.bystanders.is_one)
        found = [f"{pid}: {procfs.command_line(pid)[:200]}" for pid in marked.pids()]
        marked.kill()
        return found

    def stop(self) -> None:
        """Begin no more trials."""
        self._until = 0.0

    def close(self) -> None:
        """End the bystanders and remove every trace."""
        self.bystanders.end()
        self.places.remove()
        shutil.rmtree(self._scratch)


def main() -> int:
    """Run what the command line asks for."""
    options = _options()
    seeds = [options.trial] if options.trial is not None else list(_seeds(options))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run = Run(options)
    began = time.monotonic()
    strays: list[str] = []
    is_interrupted = False
    try:
        _run_all(run, seeds, options.jobs)
    except KeyboardInterrupt:
        is_interrupted = True  # what has been seen until then is worth its table
    finally:
        strays = run.strays()
        run.close()
    facts = {**_facts(options, run, time.monotonic() - began), "left outside of a trial's place": strays or "nothing"}
    if options.json:
        print(json.dumps({**facts, "trials": [asdict(result) for result in run.results]}, indent=1))
    else:
        print("\n".join(f"{name}: {value}" for name, value in facts.items()))
        print(chaos_table.table(run.results))
    is_failure = bool(strays) or any(result.is_failure for result in run.results)
    return 130 if is_interrupted and not is_failure else int(is_failure)


def _run_all(run: Run, seeds: list[int], jobs: int) -> None:
    with ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(run.trial, seeds))
        except BaseException:
            run.stop()  # the trials under way are ended in order
            raise


def _seeds(options: argparse.Namespace) -> Iterator[int]:
    return (chaos_plan.trial_seed(options.seed, index) for index in range(options.trials))


def _facts(options: argparse.Namespace, run: Run, seconds: float) -> dict[str, object]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": options.seed,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "user": os.geteuid(),
        "survivors counted by": run.places.method,
        "ways": ", ".join(sorted({way for result in run.results for way in result.ways})),
        "left to the sweep": "and swept" if chaos_judge.has_sweep() else "there is no `python -m harness sweep` yet",
        "seconds": round(seconds, 1),
        "failures": sum(result.is_failure for result in run.results),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/chaos", description="Exit status 1: something survived or was harmed.")
    parser.add_argument("--trials", type=int, default=100, help="how many (100)")
    parser.add_argument("--seed", type=int, default=None, help="repeats a run (else a fresh one, which is printed)")
    parser.add_argument("--seconds", type=float, default=None, help="begin no trial after this time")
    parser.add_argument("--jobs", type=int, default=_JOBS_FOR_A_CORE * (os.cpu_count() or 1), help="trials at a time")
    parser.add_argument("--only", choices=list(chaos_plan.KINDS), help="only this kind of fault")
    parser.add_argument("--trial", type=int, metavar="SEED", help="exactly this trial, which a failure has named")
    parser.add_argument("--json", action="store_true", help="print every trial as JSON instead of the table")
    parser.add_argument(
        "--marks", action="store_true", help="count survivors by marks, also where cgroups are writable"
    )
    parser.add_argument(
        "--limit", type=float, default=20.0, help="seconds from the fault until nothing may be left (20)"
    )
    parser.add_argument("--flaw", choices=("survivor", "harm"), default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trials < 1 or options.jobs < 1:
        parser.error("--trials and --jobs take a number above 0")
    if options.seed is None:
        options.seed = secrets.randbelow(1 << 32)
    return options


if __name__ == "__main__":
    sys.exit(main())
