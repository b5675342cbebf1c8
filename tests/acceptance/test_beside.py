"""Runs beside the plugins that people have, runs within runs, and two runs at once."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from acceptance.recording import CONFTEST, IMPORTS

if TYPE_CHECKING:
    from pathlib import Path

    from acceptance.recording import Record

PLAIN_AND_XDIST = pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["plain", "xdist"])


@pytest.fixture
def pytester(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Give pytest's own fixture; runs load every plugin but one, which warns where a setting of its own is not made."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:cacheprovider -p no:asyncio")
    return pytester


def run(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess(*options, timeout=90)


# ---- pytest-rerunfailures

FAILS_FIRST = """
def passes_at_the_rerun(name, *servers):
    assert all(map(answers, servers))
    note("attempt", name=name, pids=[server.pid for server in servers])
    first, *more = [attempt["pids"] for attempt in RECORD.notes("attempt") if attempt["name"] == name]
    assert more, "the first attempt fails"

def test_first(own, of_module, shared):
    passes_at_the_rerun("first", own, of_module, shared)

def test_steady(own, shared):
    assert answers(own)

@pytest.fixture
def fails_first(own):
    passes_at_the_rerun("setup", own)

def test_setup(fails_first):
    pass

def test_last(own, of_module, shared):
    passes_at_the_rerun("last", own, of_module, shared)
"""


@PLAIN_AND_XDIST
def test_each_attempt_has_servers_of_its_own(
    pytester: pytest.Pytester, record: Record, workers: tuple[str, ...]
) -> None:
    """The failed attempt's are gone before the next one's are launched; those of a wider scope are the same."""
    pytester.makepyfile(IMPORTS + FAILS_FIRST)
    result = run(pytester, "-p", "no:randomly", "--reruns", "2", *workers)
    assert result.parseoutcomes() == {"passed": 4, "rerun": 3}
    assert not any(up.left_of_earlier for up in record.check())
    for name in ("first", "setup", "last"):
        before, after = (attempt["pids"] for attempt in record.notes("attempt") if attempt["name"] == name)
        assert before[0] != after[0]
        assert before[1:] == after[1:]


@PLAIN_AND_XDIST
def test_a_shared_server_that_fails_to_start_is_launched_again(
    pytester: pytest.Pytester, record: Record, workers: tuple[str, ...]
) -> None:
    pytester.makepyfile(
        IMPORTS
        + """
@pytest.fixture(scope="session")
def starts_late(shared, watchdog):
    import harness
    note("start")
    if len(RECORD.notes("start")) == 1:
        watchdog.launch(["sh", "-c", "exit 3"], ready=harness.port_open()).wait_ready(timeout_s=30)
    return shared

def test_one(starts_late):
    assert answers(starts_late)
"""
    )
    result = run(pytester, "-W", "error", "--reruns", "1", "-rR", *workers)
    assert result.parseoutcomes() == {"passed": 1, "rerun": 1}
    record.check()


def test_a_test_that_crashed_its_worker_is_run_again_in_another(pytester: pytest.Pytester, record: Record) -> None:
    pytester.makepyfile(
        IMPORTS
        + """
def test_crash(own, shared):
    assert answers(own)
    note("attempt")
    if len(RECORD.notes("attempt")) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    result = run(pytester, "--reruns", "1", "-n", "1")
    assert result.parseoutcomes()["passed"] == 1
    assert "failed" not in result.parseoutcomes()
    assert len({up.client for up in record.check(servers=4, timeout_s=20.0)}) == 2


@PLAIN_AND_XDIST
def test_a_test_that_hung_is_run_again(pytester: pytest.Pytester, record: Record, workers: tuple[str, ...]) -> None:
    pytester.makepyfile(
        IMPORTS
        + """
@pytest.mark.harness_deadline(8)
def test_hangs_first(own):
    assert answers(own)
    note("attempt")
    while len(RECORD.notes("attempt")) == 1:
        time.sleep(0.01)
"""
    )
    result = run(pytester, "-W", "error", "--reruns", "1", "-rR", *workers)
    assert result.parseoutcomes() == {"passed": 1, "rerun": 1}
    first, second = record.check(servers=2)
    assert first.client == second.client
    assert second.left_of_earlier == 0


# ---- pytest-randomly

MODULE = """
@pytest.mark.parametrize("number", range(2))
def test_servers(own, of_module, shared, number):
    assert all(map(answers, [own, of_module, shared]))
    note("used", module=__name__, of_module=of_module.pid, shared=shared.pid, number=number)

class TestMore:
    def test_one(self, own, of_module, shared):
        assert all(map(answers, [own, of_module, shared]))
        note("used", module=__name__, of_module=of_module.pid, shared=shared.pid, number=2)
"""


@PLAIN_AND_XDIST
def test_any_order(pytester: pytest.Pytester, record: Record, workers: tuple[str, ...]) -> None:
    """pytest-randomly shuffles modules, classes and functions, and seeds the random numbers of each test anew."""
    pytester.makepyfile(test_one=IMPORTS + MODULE, test_two=IMPORTS + MODULE)
    orders = []
    for seed in (1, 2):
        before = len(record.notes("used"))
        run(pytester, f"--randomly-seed={seed}", *workers).assert_outcomes(passed=6)
        used = record.notes("used")[before:]
        orders.append([(use["module"], use["number"]) for use in used])
        modules = {(use["client"], use["module"], use["of_module"]) for use in used}
        assert workers or len(modules) == 2, "a module's tests have one server"
        assert len({(use["client"], use["shared"]) for use in used}) == len({use["client"] for use in used})
        record.check()
    assert workers or orders[0] != orders[1], "nothing was shuffled"


# ---- pytester in the suite of a user

OUTER = """
INNER = '''
import pytest
from acceptance.recording import answers

@pytest.mark.parametrize("number", range(2))
def test_inner(own, shared, number):
    assert all(map(answers, [own, shared]))

def test_failing_inner(own):
    assert False
'''

def in_process(pytester):
    return pytester.runpytest_inprocess("-p", "no:randomly")

def in_a_subprocess(pytester):
    return pytester.runpytest_subprocess("-p", "no:randomly", "-n", "2")

@pytest.mark.parametrize("number, run", enumerate([in_process, in_a_subprocess, in_process]))
def test_outer(pytester, own, of_module, shared, watchdog, number, run):
    pytester.makeconftest(pathlib.Path(__file__).with_name("conftest.py").read_text())
    pytester.makepyfile(**{f"test_inner_{number}": INNER})
    run(pytester).assert_outcomes(passed=2, failed=1)
    inner = [up for up in RECORD.ups() if up.test.startswith(f"test_inner_{number}.py")]
    assert len(inner) >= 4
    people = [who for up in inner for who in up.people if who.pid != os.getpid()]
    assert watchdog.pid not in [who.pid for who in people]
    processes.wait_gone((who for up in inner for who in up.tree), 0.0)
    processes.wait_gone(people, 5.0)
    assert watchdog.is_alive
    assert all(map(answers, [own, of_module, shared]))

def test_after_it(own, shared):
    assert all(map(answers, [own, shared]))
"""


@PLAIN_AND_XDIST
def test_runs_within_a_test_leave_its_servers_alone(
    pytester: pytest.Pytester, record: Record, workers: tuple[str, ...]
) -> None:
    pytester.makeconftest(CONFTEST + "pytest_plugins = ['pytester']\n")
    pytester.makepyfile(IMPORTS + OUTER)
    run(pytester, "-p", "no:randomly", *workers).assert_outcomes(passed=4)
    record.check()


LAUNCHED_WITHIN = """
INNER = '''
import pytest, harness

@pytest.mark.parametrize("number", range(2))
def test_inner(server_group, number):
    server = server_group.launch(["sh", "-c", "echo ready; sleep 100"], name="one", ready=harness.log_line("ready"))
    server.wait_ready(timeout_s=30)
    assert server.log_tail() == "ready"
    print("log:", server.log_path)
'''

def test_first(pytester):
    pytester.makepyfile(INNER)
    logs = []
    for _ in range(2):
        result = pytester.runpytest_inprocess("-p", "no:randomly", "-s")
        result.assert_outcomes(passed=2)
        logs += [line for line in result.outlines if "log:" in line]
    assert len(logs) == len(set(logs)) == 4

def test_second(request):
    if not request.config.pluginmanager.hasplugin("harness"):
        return
    server_group = request.getfixturevalue("server_group")
    server = server_group.launch(["sh", "-c", "echo one"], name="one")
    server.wait(timeout_s=30)
    assert server.log_tail() == "one"
"""


@pytest.mark.parametrize("options", [(), ("-p", "no:harness")], ids=["plugin", "no plugin"])
def test_runs_within_a_test_may_be_the_first_that_launch(pytester: pytest.Pytester, options: tuple[str, ...]) -> None:
    """An in-process run forgets each module that it was the first to import; what comes later imports it anew."""
    pytester.makeconftest("pytest_plugins = ['pytester']\n")
    pytester.makepyfile(LAUNCHED_WITHIN)
    run(pytester, "-p", "no:randomly", *options).assert_outcomes(passed=2)


# ---- two runs

TOGETHER = """
@pytest.mark.parametrize("number", range(4))
def test_servers(own, of_module, shared, number):
    assert all(map(answers, [own, of_module, shared]))
    note("both")
    processes.wait_for(lambda: len({both["test"] for both in RECORD.notes("both")}) >= number, 60.0, "the other run")
"""


def test_two_runs_with_one_state_directory(pytester: pytest.Pytester, record: Record, state_dir: Path) -> None:
    pytester.makepyfile(IMPORTS + TOGETHER)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2"]
    runs = [
        subprocess.Popen([*command, f"--basetemp={pytester.path / name}"], stdout=subprocess.PIPE, text=True)
        for name in ("a", "b")
    ]
    for each in runs:
        output = each.communicate(timeout=90)[0]
        assert each.returncode == 0, output
    ups = record.check()
    assert len({up.client for up in ups}) == 4
    assert not list(state_dir.glob("runs/*/server-*"))
    assert os.path.exists(state_dir)
