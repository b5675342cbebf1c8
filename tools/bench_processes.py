"""Processes that benchmarks look at: seeing their end without sleeping, pytest runs, and what /proc says of them."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

TOOLS = Path(__file__).parent
END_LIMIT_S = 20.0
MILLISECONDS = 1000.0
_KIB_IN_MIB = 1024


class Ends:
    """The ends of some processes, seen through pidfds that are opened while all of them live."""

    def __init__(self, pids: Iterable[int]) -> None:
        """Open the pidfds; raises ProcessLookupError if one has ended."""
        self._poll = select.poll()
        self._open: set[int] = set()
        for pid in pids:
            descriptor = os.pidfd_open(pid)
            self._open.add(descriptor)
            self._poll.register(descriptor, select.POLLIN)

    def wait(self) -> float:
        """Give the monotonic time at which the last of them was seen to have ended; raises TimeoutError."""
        try:
            while self._open:
                ended = self._poll.poll(END_LIMIT_S * MILLISECONDS)
                if not ended:
                    raise TimeoutError(f"{len(self._open)} processes still live after {END_LIMIT_S} s")
                for descriptor, _ in ended:
                    self._close(descriptor)
            return time.monotonic()
        finally:
            for descriptor in list(self._open):
                self._close(descriptor)

    def _close(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        self._open.discard(descriptor)
        os.close(descriptor)


def python_program(name: str, *arguments: str) -> list[str]:
    """Give the command of a program beside this file, with the fastest start that Python has."""
    return [sys.executable, "-I", "-S", str(TOOLS / name), *arguments]


def pytest_command(scratch: Path, *arguments: str) -> list[str]:
    """Give the command of a pytest run that reads no configuration and writes no cache."""
    plugins = [part for name in ("cacheprovider", "randomly", "rerunfailures") for part in ("-p", f"no:{name}")]
    quiet = ["-q", *plugins, "-c", os.devnull, f"--rootdir={scratch}"]
    return [sys.executable, "-m", "pytest", *quiet, *arguments]


def environment(scratch: Path, **names: str) -> dict[str, str]:
    """Give this process's environment, with a state directory of its own and `names` over it.

    Bytecode is used, whatever this process was told: an installed plugin has been compiled, as its peer has.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**inherited, "HARNESS_STATE_DIR": str(scratch / "state"), **names}


def run_pytest(scratch: Path, *arguments: str, **names: str) -> float:
    """Run pytest to its end, and give the seconds it took; raises RuntimeError, with its output, if a test fails."""
    began = time.monotonic()
    done = subprocess.run(
        pytest_command(scratch, *arguments),
        env=environment(scratch, **names),
        cwd=scratch,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=END_LIMIT_S,
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
