"""A watchdog and a keeper of it are killed at once: what they leave is found by the ledger, and ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import cgroup_tree
import processes
import pytest
from faults.runs import Watched

import harness
from harness import procfs

if TYPE_CHECKING:
    from collections.abc import Iterator

MARKED_SERVER = Path(__file__).with_name("marked_server.py")
FOUND_BY_A_MARK = ("worker", "session", "environment", "log", "child")
EVERYBODY = (*FOUND_BY_A_MARK, "nothing")


class Lost:
    """A server whose watchdog and keeper have been killed; its processes are held by pidfds."""

    def __init__(self, state: Path, members: tuple[str, ...]) -> None:
        self.state = state
        names = state.parent / "members"
        self.watchdog = harness.Watchdog(state_dir=state).start()
        command = [sys.executable, "-I", "-S", str(MARKED_SERVER), str(names), *members]
        server = self.watchdog.launch(command, ready=harness.log_line("ready"), name="lost").wait_ready(timeout_s=30)
        lines = names.read_text(encoding="ascii").splitlines()
        self.pids = {line.split()[0]: int(line.split()[1]) for line in lines}
        self.watched = Watched(server.pids())
        keeper = processes.parent(server.pid)
        self.kill(keeper)

    def kill(self, keeper: int) -> None:
        """Kill both so that neither can act: stopped processes are killed, the keeper first."""
        watchdog = self.watchdog.pid or 0
        with Watched([watchdog, keeper]) as killed:
            for number, pid in ((signal.SIGSTOP, watchdog), (signal.SIGSTOP, keeper)):
                os.kill(pid, number)
            for pid in (keeper, watchdog):
                os.kill(pid, signal.SIGKILL)
            assert killed.wait_gone(10.0) == []

    def alive(self) -> set[str]:
        """Give the members that are alive."""
        alive = self.watched.alive()
        return {name for name, pid in self.pids.items() if pid in alive}

    def end(self) -> None:
        with pytest.raises(harness.WatchdogDied):
            self.watchdog.close()
        for pid in self.watched.alive():
            os.kill(pid, signal.SIGKILL)
        assert self.watched.wait_gone(10.0) == []
        self.watched.__exit__()


@pytest.fixture(params=["cgroup", "sweep"])
def lost(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lost]:
    if request.param == "sweep":
        monkeypatch.setenv("HARNESS_CGROUP", "off")
    elif cgroup_tree.own() is None:
        pytest.skip("this process's cgroup cannot be written to: there is no other kill path here than the sweep")
    members = EVERYBODY if request.param == "cgroup" else FOUND_BY_A_MARK
    server = Lost(tmp_path / "state", members)
    yield server
    server.end()
    assert cgroup_tree.of_watchdog(server.watchdog.pid or 0) == []


def sweep(state: Path, *options: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "harness", "sweep", "--state-dir", str(state), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_sweep_shows_them_and_ends_them(lost: Lost, bystander: int) -> None:
    before = lost.alive()
    assert before == set(lost.pids)
    code, text = sweep(lost.state)
    assert code == 1
    assert lost.alive() == before, "showing ends nobody"
    _, *rows, advice = text.splitlines()
    assert advice.startswith("python -m harness sweep --yes ends them")
    shown = {int(row.split()[0]) for row in rows}
    assert shown == set(lost.watched.alive())
    assert "lost" in text
    code, text = sweep(lost.state, "--yes", "--json")
    assert (code, lost.watched.wait_gone(0.0)) == (0, [])
    assert {(row["pid"], row["outcome"]) for row in json.loads(text)["found"]} == {(pid, "ended") for pid in shown}
    assert sweep(lost.state) == (0, "no dead run has left anything\n")
    assert procfs.stat(bystander) is not None


def test_the_next_watchdog_ends_them(lost: Lost, bystander: int) -> None:
    assert lost.alive() == set(lost.pids)
    with harness.Watchdog(state_dir=lost.state) as following:
        assert lost.watched.alive() == []
        assert following.is_alive
    assert not list(lost.state.rglob("server-*.json"))
    assert procfs.stat(bystander) is not None


def test_several_end_them_at_once(lost: Lost, bystander: int) -> None:
    command = [sys.executable, "-m", "harness", "sweep", "--yes", "--state-dir", str(lost.state)]
    sweeping = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(3)]
    for process in sweeping:
        assert process.communicate(timeout=60)[1] == b""
        assert process.returncode == 0
    assert lost.watched.alive() == []
    assert procfs.stat(bystander) is not None


def test_a_live_run_is_left_alone(lost: Lost) -> None:
    """It has the same state directory; its keeper holds its entry, or its watchdog lives."""
    with harness.Watchdog(state_dir=lost.state) as other:
        server = other.launch(["sleep", "60"])
        assert sweep(lost.state, "--yes") == (0, "no dead run has left anything\n")
        assert server.is_alive
        keeper = processes.parent(server.pid)
        os.kill(other.pid or 0, signal.SIGSTOP)  # it cannot see that the keeper dies
        os.kill(keeper, signal.SIGKILL)
        assert sweep(lost.state, "--yes") == (0, "no dead run has left anything\n")
        assert list(lost.state.rglob("server-*.json")) != []
        os.kill(other.pid or 0, signal.SIGCONT)
