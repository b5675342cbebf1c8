"""Fixtures of the fault tests: runs that end whatever they started, and a bystander that must live."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Protocol

import pytest
from faults.runs import TREE_SERVER, Run, Watched

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
