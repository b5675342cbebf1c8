"""Processes that benchmarks look at: seeing their end without sleeping, pytest runs, and what /proc says of them."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
END_LIMIT_S = 20.0
RUN_LIMIT_S = 120.0
MILLISECONDS = 1000.0
_KIB_IN_MIB = 1024


class Ends:
    """The ends of some processes, seen through pidfds that are opened while all live; for contextlib.closing."""

    def __init__(self, pids: Iterable[int]) -> None:
        """Open the pidfds; raises ProcessLookupError if one has ended."""
        self._open: list[int] = []
        try:
            for pid in pids:
                self._open.append(os.pidfd_open(pid))
        except OSError:
            self.close()
            raise

    def wait(self, limit_s: float = END_LIMIT_S) -> float:
        """Give the monotonic time at which the last of them was seen to have ended; raises TimeoutError.

        They are looked at one after another: to wait for all at once costs the more the more there are, while they end.
        """
        deadline = time.monotonic() + limit_s
        for descriptor in self._open:
            if not _has_ended(descriptor, max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"{self.left()} processes still live after {limit_s} s")
        return time.monotonic()

    def left(self) -> int:
        """Say how many have not ended."""
        return sum(not _has_ended(descriptor, 0.0) for descriptor in self._open)

    def kill(self) -> None:
        """End those that have not ended, and see them end."""
        for descriptor in self._open:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        """Look no more."""
        while self._open:
            os.close(self._open.pop())


def _has_ended(pidfd: int, limit_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(limit_s * MILLISECONDS))


def python_program(name: str, *arguments: str) -> list[str]:
    """Give the command of a program beside this file, with the fastest start that Python has."""
    return [sys.executable, "-I", "-S", str(HERE / name), *arguments]


def pytest_command(scratch: Path, *arguments: str, plugin: str = "harness") -> list[str]:
    """Give the command of a pytest run that reads no configuration, with one of the plugins."""
    others = {"harness", "xprocess"} - {plugin}
    unwanted = ("randomly", "rerunfailures", "asyncio", "anyio", "timeout", *sorted(others))
    plugins = [part for name in unwanted for part in ("-p", f"no:{name}")]
    quiet = ["-q", *plugins, "-c", os.devnull, f"--rootdir={scratch}", f"--basetemp={scratch / 'tmp'}"]
    return [sys.executable, "-m", "pytest", *quiet, *arguments]


def environment(scratch: Path, **names: str) -> dict[str, str]:
    """Give this process's environment, with a state directory of its own and `names` over it.

    Bytecode is used, whatever this process was told: an installed plugin has been compiled, as its peer has.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**inherited, "HARNESS_STATE_DIR": str(scratch / "state"), "PYTHONPATH": paths, **names}


def run_pytest(scratch: Path, *arguments: str, plugin: str = "harness", **names: str) -> float:
    """Run pytest to its end, and give the seconds it took; raises RuntimeError, with its output, if a test fails."""
    began = time.monotonic()
    done = subprocess.run(
        pytest_command(scratch, *arguments, plugin=plugin),
        env=environment(scratch, **names),
        cwd=scratch,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=RUN_LIMIT_S,
    )
    seconds = time.monotonic() - began
    if done.returncode != 0:
        raise RuntimeError(f"pytest has failed:\n{done.stdout}{done.stderr}")
    return seconds


def context_switches(pid: int) -> int:
    """Give how often a process has been switched away from, of its own will and otherwise."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)


def private_mib(smaps_rollup: Path) -> float:
    """Give the memory that would be free if a process ended, from its /proc/PID/smaps_rollup or a copy of it."""
    lines = smaps_rollup.read_text(encoding="utf-8").splitlines()
    return (
        sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) / _KIB_IN_MIB
    )


def cpu_ns(pid: int) -> int:
    """Give the CPU time of a process's one thread: /proc/PID/schedstat (Linux, Documentation/scheduler)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[0])


def reaped_ns(pid: int) -> int:
    """Give the CPU time of a process's children that have been reaped, and of theirs: proc(5), cutime and cstime."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))
