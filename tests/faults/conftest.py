"""Fixtures of the fault tests: runs that end whatever they started, and a bystander that must live."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from typing import TYPE_CHECKING, Any, Protocol

import processes
import pytest
from faults.runs import TREE_SERVER, Run, Watched

import harness
from harness import procfs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class StartRun(Protocol):
    """Starts a pytest run of the suite in `runs`."""

    def __call__(self, *options: str, **settings: Any) -> Run: ...


@pytest.fixture
def start_run(tmp_path: Path, bystander: int) -> Iterator[StartRun]:
    """Give a function that starts a run. Afterwards nothing of it may be left, and the bystander must live."""
    runs: list[Run] = []

    def start(*options: str, **settings: Any) -> Run:
        directory = tmp_path / f"run-{len(runs)}"
        directory.mkdir()
        runs.append(Run(directory, *options, **settings))
        return runs[-1]

    yield start
    for run in runs:
        run.kill_rest()
    with Watched([bystander]) as watched:
        assert watched.alive() == [bystander], "a process that is not ours was harmed"


@pytest.fixture(scope="session")
def bystander(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Run the same server program outside of any watchdog: nobody may signal it."""
    marks = tmp_path_factory.mktemp("bystander")
    command = [sys.executable, "-I", "-S", str(TREE_SERVER), str(marks)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield server.pid
        tree = [server.pid, *_tree_of(server.pid, marks)]
        assert list(marks.iterdir()) == [], "a process that is not ours was asked to exit"
        with Watched(tree) as watched:
            assert sorted(watched.alive()) == sorted(tree)
            _kill(tree)
            assert watched.wait_gone(10.0) == []


def _tree_of(pid: int, marks: Path) -> list[int]:
    # Its daemon has left the tree; it is known by the directory in its command line.
    found = set(procfs.descendants(pid))
    for name in procfs.descendants(1):
        if str(marks) in procfs.command_line(name) and name != pid:
            found.add(name)
    return sorted(found)


def _kill(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def guarded(tmp_path: Path, bystander: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[harness.Watchdog]:
    """Give a watchdog; afterwards no process with this test's mark in its environment may be left, whoever has it."""
    monkeypatch.setenv("HARNESS_FAULT_TEST", uuid.uuid4().hex)
    mark = f"HARNESS_FAULT_TEST={os.environ['HARNESS_FAULT_TEST']}"
    owner = harness.Watchdog(state_dir=tmp_path / "state", crash_grace_s=0.5).start()
    yield owner
    with contextlib.suppress(harness.WatchdogDied):
        owner.close()
    try:
        processes.wait_for(lambda: not processes.marked(mark), 2.0, "keepers have left")
    finally:
        _kill(processes.marked(mark))
    with Watched([bystander]) as watched:
        assert watched.alive() == [bystander], "a process that is not ours was harmed"
