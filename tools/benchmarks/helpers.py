"""What the watchdog and its keepers use while nothing happens."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import harness
from harness import procfs
from tools.benchmarks.processes import HERE, ROOT, context_switches, private_mib, run_pytest
from tools.benchmarks.rows import LIMIT, OURS, Row

if TYPE_CHECKING:
    from tools.benchmarks.rows import Settings

_SETTLE_S = 0.5
_IDLE_S = 2.0
_EXECUTED = "a Python that only waits (-I -S)"
_FORKED = "a child of such a Python that only waits"
_WAITS = "import signal; print(flush=True); signal.pause()"
# A child that is forked from Python and touches next to nothing: what the kernel copies for it.
_FORKS = (
    "import os, signal\nif os.fork():\n    os.wait()\nelse:\n    print(os.getpid(), flush=True)\n    signal.pause()"
)

_IMPORTS = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import harness.watchdog.main; {_WAITS}"
_FORKS_WITH = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import harness.watchdog.main\n{_FORKS}"


def helpers(settings: Settings) -> list[Row]:
    """Count the context switches of a watchdog and a keeper with one idle server; measure their private memory.

    The limit is a process that sleeps. One that wakes up now and then disturbs what is measured on the machine. The
    watchdog's memory is that of one in a pytest run of 200 tests which collect garbage: a plain fork of pytest would be
    left with its own copy of every page that pytest changes.
    """
    rounds = settings.choose(7, 1)
    with (
        harness.Watchdog(state_dir=settings.scratch / "state") as watchdog,
        watchdog.launch(["sleep", "1000"]) as server,
    ):
        root = procfs.stat(server.pid)
        pids = {"watchdog": watchdog.pid or 0, "keeper": root.parent if root else 0}
        time.sleep(_SETTLE_S)
        switches: dict[str, list[float]] = {name: [] for name in pids}
        for _ in range(settings.choose(7, 3)):
            before = {name: context_switches(pid) for name, pid in pids.items()}
            time.sleep(_IDLE_S)
            for name, pid in pids.items():
                switches[name].append(float(context_switches(pid) - before[name]))
        keepers_mib = [private_mib(Path(f"/proc/{pids['keeper']}/smaps_rollup"))]
    watchdogs_mib = [_watchdog_mib(settings) for _ in range(rounds)]
    keepers_mib += [_keeper_mib(settings) for _ in range(rounds - 1)]
    waiting = _bare_mib(_WAITS, rounds)
    with_modules, forked = (statistics.median(_bare_mib(code, rounds)) for code in (_IMPORTS, _FORKS_WITH))
    watchdog_why = f"the modules that it needs: a Python that has them and only waits has {with_modules:.2f} MiB."
    keeper_why = (
        "it is a fork of the watchdog, and what either of them writes to is its own from then on; Python writes to each"
        f" object that it uses. A child of a Python with the same modules that only waits has {forked:.2f} MiB."
    )
    return [
        *(
            Row(f"idle {name}: switches in {_IDLE_S:g} s", "switches", {OURS: counts, LIMIT: [0.0]}, "none", bound=1.0)
            for name, counts in switches.items()
        ),
        Row(
            "memory of the watchdog",
            "MiB",
            {OURS: watchdogs_mib, LIMIT: waiting},
            _EXECUTED,
            4.0,
            watchdog_why,
            with_modules - statistics.median(waiting),
        ),
        Row(
            "memory of a keeper",
            "MiB",
            {OURS: keepers_mib, LIMIT: _bare_mib(_FORKS, rounds)},
            _FORKED,
            12.0,
            keeper_why,
        ),
    ]


def _watchdog_mib(settings: Settings) -> float:
    memory = settings.scratch / "memory"
    run_pytest(settings.scratch, str(HERE / "case_trivial.py"), BENCH_MEMORY=str(memory))
    return private_mib(memory)


def _keeper_mib(settings: Settings) -> float:
    with (
        harness.Watchdog(state_dir=settings.scratch / "state") as watchdog,
        watchdog.launch(["sleep", "1000"]) as server,
    ):
        root = procfs.stat(server.pid)
        time.sleep(_SETTLE_S)
        return private_mib(Path(f"/proc/{root.parent if root else 0}/smaps_rollup"))


def _bare_mib(code: str, rounds: int) -> list[float]:
    return [_one_bare_mib(code) for _ in range(rounds)]


def _one_bare_mib(code: str) -> float:
    command = [sys.executable, "-I", "-S", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        said = process.stdout.readline() if process.stdout else b""
        try:
            return private_mib(Path(f"/proc/{said.decode().strip() or process.pid}/smaps_rollup"))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
