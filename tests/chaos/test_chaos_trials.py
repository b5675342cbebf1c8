"""Real trials, and that what judges them would see a broken promise."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import processes
import pytest

from tools import chaos_trial
from tools.chaos_bystanders import Bystanders
from tools.chaos_count import MarksPlace, Places
from tools.chaos_plan import Failure, Fault, Plan, Server, When, trial_seed
from tools.chaos_result import Around
from tools.chaos_steps import KEEPER, PYTEST, WATCHDOG, WORKER

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
KILL, STOP, TERM = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM
ONE_TRIAL = ("--trials", "1", "--seed", "3", "--only", "close the Pipe")


def chaos(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.chaos_main", *options]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=100)


@pytest.fixture
def around() -> Iterator[Around]:
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:  # a socket's path is short: tmp_path may not be
        places = Places()
        bystanders = Bystanders(Path(scratch) / "bystander", places.bystanders())
        yield Around(places, bystanders, 20.0)
        bystanders.end()
        places.remove()


def node(how: str, *below: dict[str, Any], **traits: object) -> dict[str, Any]:
    plain = {"ignores": True, "slow_s": 0.0, "clears": False, "retitles": False, "hops_s": 0.0, "storm": 0}
    return {"how": how, **plain, "chats": False, "leaves": False, "below": list(below), **traits}


HOSTILE = node(
    "root",
    node("worker", node("daemon", clears=True)),
    node("setsid", retitles=True, hops_s=0.02),
    node("daemon", slow_s=5.0),
    storm=10,
)


def make_plan(*faults: Fault, workers: int = 0, when: When | None = None, failure: Failure | None = None) -> Plan:
    server = Server(HOSTILE, grace_s=0.3, ask="root", ready="log")
    return Plan(
        seed=0,
        workers=workers,
        tests=((server, server),),
        faults=faults,
        failure=failure,
        when=When("the servers are up") if when is None else when,
        crash_grace_s=0.3,
        linger_s=0.1,
        has_sibling=failure is None,
        may_use_cgroups=len(faults) != 1,
    )


def signalled(target: str, number: int) -> Fault:
    return Fault("signal", target, number)


def describe(value: object) -> str | None:
    return f"{value.fault}-{value.target}-{value.when.step}" if isinstance(value, Plan) else None


@pytest.mark.parametrize(
    ("plan", "shortest_s"),
    [
        (make_plan(signalled(PYTEST, KILL)), 0.0),
        (make_plan(signalled(PYTEST, STOP)), 0.0),
        (make_plan(signalled(WATCHDOG, KILL)), 0.3),
        (make_plan(signalled(KEEPER, STOP), when=When("between spawn and reply")), 0.3),
        (make_plan(signalled(PYTEST, KILL), signalled(KEEPER, KILL), when=When("in the kill")), 0.0),
        (make_plan(signalled(WORKER, KILL), workers=2), 0.0),
        (make_plan(Fault("close the Pipe", PYTEST), when=When("between request and reply", 2)), 0.0),
        (make_plan(Fault("no descriptors", KEEPER)), 0.0),
        (make_plan(failure=Failure("keeper", 2, 11), when=When()), 0.0),
    ],
    ids=describe,
)
def test_nothing_survives(around: Around, plan: Plan, shortest_s: float) -> None:
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        result = chaos_trial.run(plan, Path(scratch) / "t", around)
    assert not result.is_failure, result
    assert result.is_reached, result
    assert result.clean_s is not None
    assert result.clean_s >= shortest_s


@pytest.mark.parametrize("method", [[], ["--marks"]], ids=["cgroup", "marks"])
def test_a_survivor_is_seen(method: list[str]) -> None:
    """The suite leaves a process that no watchdog knows of."""
    done = chaos(*ONE_TRIAL, "--limit", "10", "--flaw", "survivor", *method)
    assert done.returncode == 1, done
    assert "(parent 1, state S, server): /bin/sleep 60" in done.stderr
    assert f"repeat it: bash tools/chaos --trial {trial_seed(3, 0)} " in done.stderr
    assert not left_of(done)


def left_of(done: subprocess.CompletedProcess[str]) -> list[processes.Identity]:
    """Give what the tool has not ended of what it says it has seen."""
    pids = [int(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("  survivor: ")]
    assert pids
    return processes.left_after(processes.identities(pids), 10.0)


def test_harm_is_seen() -> None:
    done = chaos(*ONE_TRIAL, "--flaw", "harm")
    assert done.returncode == 1, done
    assert "has got signal 15 (Terminated)" in done.stderr
    assert "| 1                 |" in done.stdout


def test_what_is_left_outside_of_a_trials_cgroup_is_seen(tmp_path: Path) -> None:
    """As if the product had moved a server elsewhere: only its marks tell."""
    places = Places()
    directory = tmp_path / "scratch"
    directory.mkdir()
    with subprocess.Popen(["/bin/sleep", "60"], cwd=directory) as stray:
        found = MarksPlace(directory, lambda _pid: False)
        processes.wait_for(lambda: found.pids() == [stray.pid], 10.0, "it is seen")
        assert MarksPlace(directory, lambda pid: pid == stray.pid).pids() == []
        found.kill()
        assert stray.wait(10.0) == -signal.SIGKILL
        assert found.pids() == []
    places.remove()


def test_trials_are_repeated_by_their_seed_and_printed_as_json() -> None:
    done = chaos("--trials", "2", "--seed", "8", "--only", "exec fails", "--json")
    assert done.returncode == 0, done
    first = json.loads(done.stdout)
    again = json.loads(chaos("--trial", str(first["trials"][0]["seed"]), "--only", "exec fails", "--json").stdout)
    same = ("seed", "fault", "target", "step", "workers")
    assert [again["trials"][0][name] for name in same] == [first["trials"][0][name] for name in same]
    assert first["seed"] == 8
    assert first["kernel"] == os.uname().release


@pytest.mark.parametrize("options", [["--trials", "0"], ["--only", "nothing"], ["--jobs", "0"], ["--what"]], ids=str)
def test_usage(options: list[str]) -> None:
    assert chaos(*options).returncode == 2


def test_no_trial_begins_after_the_time() -> None:
    done = chaos("--trials", "500", "--seconds", "0.5", "--seed", "8", "--json")
    assert done.returncode == 0, done
    assert 1 <= len(json.loads(done.stdout)["trials"]) < 500
