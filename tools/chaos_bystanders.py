"""Processes that are not of a trial, and must live through all of them without one signal."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from harness import procfs

_PROGRAM = str(Path(__file__).with_name("chaos_bystander.py"))
_UP_LIMIT_S = 20.0
_POLL_S = 0.01


class Bystanders:
    """One tree for the whole run of the tool: a root, its child, and a daemon."""

    def __init__(self, marks: Path, cgroups: list[str]) -> None:
        """Start it; `cgroups` is where it goes, as Places.bystanders gives it."""
        self.cgroups = cgroups
        self.marks = marks
        marks.mkdir()
        command = [sys.executable, "-I", "-S", _PROGRAM, str(marks), *cgroups]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        self._known: dict[Path, dict[int, int]] = {marks: self._pids(marks)}

    def is_one(self, pid: int) -> bool:
        """Say whether a process is a bystander."""
        return _PROGRAM in procfs.command_line(pid)

    def harmed(self) -> list[str]:
        """Say what has happened to the tree: an end, a stop, or any signal."""
        return _harm(self.marks, self._known[self.marks])

    def harmed_sibling(self, marks: Path) -> list[str]:
        """Say the same of a trial's sibling, if that came to be, and end it."""
        if not (marks / "up").exists():
            return []
        pids = self._pids(marks)
        found = _harm(marks, pids)
        _end(pids)
        return found

    def _pids(self, marks: Path) -> dict[int, int]:
        deadline = time.monotonic() + _UP_LIMIT_S
        while not (marks / "up").exists():
            if time.monotonic() > deadline:
                raise TimeoutError("the bystander does not start")
            time.sleep(_POLL_S)
        pids = [int(pid) for pid in (marks / "up").read_text(encoding="ascii").split()]
        return {pid: stat.start_time if (stat := procfs.stat(pid)) else 0 for pid in pids}

    def end(self) -> None:
        """End the tree."""
        _end(self._known[self.marks])
        self._process.wait()
        shutil.rmtree(self.marks)


def _harm(marks: Path, pids: dict[int, int]) -> list[str]:
    found = []
    for pid, start_time in pids.items():
        stat = procfs.stat(pid)
        if stat is None or stat.start_time != start_time or stat.state in "ZX":
            found.append(f"bystander {pid} has been ended")
        elif stat.state in "Tt":
            found.append(f"bystander {pid} has been stopped")
    signalled = [path for path in marks.iterdir() if "-" in path.name]
    for path in signalled:
        who, _, number = path.name.partition("-")
        found.append(f"bystander {who} has got signal {number} ({signal.strsignal(int(number))})")
    return found


def _end(pids: dict[int, int]) -> None:
    for pid, start_time in pids.items():
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            try:
                if procfs.is_alive(pid, start_time):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            finally:
                os.close(descriptor)
