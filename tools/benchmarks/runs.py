"""Runs of pytest whose one test owns servers in one of the ways (case_servers.py), as a benchmark drives them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tools.benchmarks.processes import END_LIMIT_S, HERE, Ends, environment, pytest_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_LOOK_S = 0.005
_FEW = 8
CASE = str(HERE / "case_servers.py")
PLUGINS = {"harness": "harness", "pytest-xprocess": "xprocess"}


@dataclass(frozen=True)
class Plan:
    """What each test is to do: `options` are those of server_tree.py; with `ignores` the first server has one more."""

    way: str
    count: int
    stop_s: float = 1.0
    grace_s: float = 15.0
    options: tuple[str, ...] = ()
    ignores: bool = False
    then: str = "stop"
    tests: int = 1
    uses_s: float = 0.0
    is_watched: bool = True


class Run:
    """One such run, of which all servers are up. Whatever it leaves is ended with `running`."""

    def __init__(self, process: subprocess.Popen[bytes], told: Iterator[Any], log: TextIO) -> None:
        self.process = process
        self._told = told
        self._log = log
        said = self.told()
        self.began: float = said["began"]
        self._test = os.pidfd_open(said["test"])
        self.ends = Ends(said["pids"])

    def told(self) -> Any:
        """Give what it tells next; raises RuntimeError, with its output, if it has ended."""
        try:
            return next(self._told)
        except StopIteration:
            raise self.failure() from None

    def failure(self) -> RuntimeError:
        """Give what it printed."""
        self._log.seek(0)
        return RuntimeError(f"pytest has failed:\n{self._log.read()}")

    def see_its_end(self, plan: Plan) -> None:
        """Raise RuntimeError, with its output, if a run that was to end by itself has failed."""
        if plan.then == "stop" and self.process.wait(END_LIMIT_S):
            raise self.failure()

    def signal(self, number: int) -> None:
        """Send a signal to the test process, a worker of pytest-xdist where there is one."""
        signal.pidfd_send_signal(self._test, number)

    def close(self) -> None:
        """End what is left of it."""
        self.ends.kill()
        self.ends.close()
        os.close(self._test)


@contextlib.contextmanager
def running(scratch: Path, plan: Plan, *arguments: str, **names: str) -> Iterator[Run]:
    """Run it; at the end nothing of its servers is left. Raises RuntimeError, with its output, if it fails."""
    with (
        tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder,
        open(f"{folder}/log", "w+", encoding="utf-8") as log,
        open(f"{folder}/told", "w+", encoding="ascii") as told,
        subprocess.Popen(
            pytest_command(Path(folder), CASE, *arguments, plugin=PLUGINS.get(plan.way, "none")),
            env=environment(
                Path(folder),
                BENCH_PLAN=json.dumps(asdict(plan)),
                BENCH_TOLD=told.name,
                PYTHONWARNINGS="ignore",
                **names,
            ),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
        ) as process,
    ):
        try:
            with contextlib.closing(Run(process, _lines(told, process), log)) as run:
                Path(f"{told.name}.seen").touch()
                yield run
                run.see_its_end(plan)
        except BaseException:
            process.kill()  # its servers have an alarm, should they be nobody's
            raise
        _end(process)


def _lines(told: TextIO, process: subprocess.Popen[bytes]) -> Iterator[Any]:
    """Give what is told, line by line, until the process has ended: a pipe would not reach a worker of pytest-xdist."""
    text = ""
    while True:
        has_ended = process.poll() is not None
        text += told.read()
        while "\n" in text:
            line, text = text.split("\n", 1)
            yield json.loads(line)
        if has_ended:
            return
        time.sleep(_LOOK_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let it end by itself, if it does: a watchdog of it is to have time for its end."""
    try:
        process.wait(END_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()


def measured(
    scratch: Path, plan: Plan, ways: Sequence[str], rounds: int, measure: Callable[[Path, Plan], float]
) -> dict[str, list[float]]:
    """Measure each way in turn, so many rounds; the way that is first changes."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        turn = number % len(ways)
        for way in [*ways[turn:], *ways[:turn]]:
            found[way].append(measure(scratch, replace(plan, way=way)))
    return found


def measured_at_once(
    scratch: Path, plan: Plan, ways: Sequence[str], rounds: int, measure: Callable[[Path, Plan], float]
) -> dict[str, list[float]]:
    """Measure ways that wait for one server after another, some runs of them at the same time: it would take hours."""
    plans = [replace(plan, way=way) for way in ways for _ in range(rounds)]
    with ThreadPoolExecutor(max(1, min(len(plans), _most_at_once(plan)))) as pool:
        results = list(pool.map(lambda one: measure(scratch, one), plans))
    return {way: results[number * rounds : (number + 1) * rounds] for number, way in enumerate(ways)}


def _most_at_once(plan: Plan) -> int:
    return 8 if plan.count <= _FEW else 6
