"""Processes that SIGKILL does not end at once, as one that waits for a dead disk: two ways to hold real ones.

`Frozen`: the freezer of cgroup v1, for root: a frozen process does not take SIGKILL until it is thawed. `Traced`: a
process that is traced with PTRACE_O_TRACEEXIT stops on its way out, until its tracer lets it go (ptrace(2)).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest
from processes import identify, is_running, wait_for

from harness import procfs

if TYPE_CHECKING:
    from collections.abc import Sequence

_FREEZER = Path("/sys/fs/cgroup/freezer")
_TIMEOUT_S = 10.0

_TRACER = """
import ctypes, sys
ptrace = ctypes.CDLL(None, use_errno=True).ptrace
ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
SEIZE, TRACEEXIT = 0x4206, 0x40
for line in sys.stdin:
    pids = [int(word) for word in line.split()]
    print(*[ctypes.get_errno() if ptrace(SEIZE, pid, None, TRACEEXIT) else 0 for pid in pids], flush=True)
"""  # the kernel lets every traced process go when the tracer ends


class Holder(Protocol):
    """Holds processes against SIGKILL."""

    def hold(self, pids: Sequence[int]) -> None:
        """Hold them from now on."""

    def release(self) -> None:
        """Let them end."""


class Frozen:
    """Holds processes in a frozen cgroup."""

    def __init__(self) -> None:
        self._cgroup = _FREEZER / f"harness-test-{uuid.uuid4().hex}"
        try:
            self._cgroup.mkdir()
        except OSError as error:
            pytest.skip(f"no cgroup v1 freezer that may be written: {error}")

    def hold(self, pids: Sequence[int]) -> None:
        for pid in pids:
            (self._cgroup / "cgroup.procs").write_text(str(pid), encoding="ascii")
        (self._cgroup / "freezer.state").write_text("FROZEN", encoding="ascii")
        state = self._cgroup / "freezer.state"
        wait_for(lambda: state.read_text(encoding="ascii") == "FROZEN\n", _TIMEOUT_S, "all are frozen")

    def release(self) -> None:
        if self._cgroup.exists():
            (self._cgroup / "freezer.state").write_text("THAWED", encoding="ascii")
            wait_for(self._is_removed, _TIMEOUT_S, "the cgroup is empty")

    def _is_removed(self) -> bool:
        with contextlib.suppress(OSError):
            self._cgroup.rmdir()
        return not self._cgroup.exists()


class Traced:
    """Holds processes by tracing their exit."""

    def __init__(self) -> None:
        self._tracer = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _TRACER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            self._check()
        except BaseException:
            self.release()
            raise

    def hold(self, pids: Sequence[int]) -> None:
        assert self._tracer.stdin is not None
        assert self._tracer.stdout is not None
        print(*pids, file=self._tracer.stdin, flush=True)
        failures = {int(word) for word in self._tracer.stdout.readline().split()} - {0}
        if failures:
            pytest.skip(f"processes may not be traced here: {os.strerror(failures.pop())}")

    def _check(self) -> None:
        with subprocess.Popen([sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"]) as probe:
            who = identify(probe.pid)
            assert who is not None
            try:
                self.hold([probe.pid])
                probe.kill()
                wait_for(lambda: not is_running(who) or _state(probe.pid) == "t", _TIMEOUT_S, "it stops or ends")
                if not is_running(who):
                    pytest.skip("this kernel does not hold a traced process against SIGKILL")
                self._let_go()
            finally:
                probe.kill()

    def _let_go(self) -> None:
        self.release()
        self._tracer = subprocess.Popen(self._tracer.args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def release(self) -> None:
        if self._tracer.stdin is not None and not self._tracer.stdin.closed:
            self._tracer.communicate()


def _state(pid: int) -> str:
    found = procfs.stat(pid)
    return "" if found is None else found.state
