"""Runs under pytest-xdist: every way of distributing tests, workers that crash, runs that end early or go on later."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from acceptance.recording import IMPORTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from acceptance.recording import Record

# The second module has two groups for --dist loadgroup.
MODULE = """
@pytest.mark.parametrize("number", [
    pytest.param(0, marks=pytest.mark.xdist_group({groups[0]!r})),
    pytest.param(1, marks=pytest.mark.xdist_group({groups[1]!r})),
    pytest.param(2, marks=pytest.mark.xdist_group({groups[0]!r})),
])
def test_servers(own, of_module, shared, number):
    assert all(map(answers, [own, of_module, shared]))
    note("used", module=__name__, group={groups!r}[number % 2], of_module=of_module.pid, shared=shared.pid)
"""
# Two modules in two workers. xdist holds a worker's last test back until it knows what follows, and gives a lost
# worker's tests to another that has at most two left.
TWO_MODULES = "--dist=loadscope"


def run(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess(*options, timeout=90)


def one_worker_for_each(used: Sequence[dict[str, object]], key: str) -> bool:
    return len({use[key] for use in used}) == len({(use[key], use["client"]) for use in used})


@pytest.mark.parametrize("dist", ["load", "loadscope", "loadgroup", "worksteal", "each"])
def test_every_way_of_distributing_tests(pytester: pytest.Pytester, record: Record, dist: str) -> None:
    pytester.makepyfile(
        test_one=IMPORTS + MODULE.format(groups=["a", "a"]), test_two=IMPORTS + MODULE.format(groups=["b", "c"])
    )
    result = run(pytester, "--dist", dist, "--tx", "2*popen")
    tests = 12 if dist == "each" else 6
    result.assert_outcomes(passed=tests)
    used = record.notes("used")
    clients = {use["client"] for use in used}
    modules = {(use["client"], use["module"], use["of_module"]) for use in used}
    assert len(clients) == 2
    assert len({(use["client"], use["shared"]) for use in used}) == 2, "a worker's tests have one session's server"
    assert (dist != "loadscope") or one_worker_for_each(used, "module")
    # With pytest 9.2, xdist 3.8 does not group: https://github.com/pytest-dev/pytest-xdist/issues/1386
    does_group = dist == "loadgroup" and "@" in used[0]["test"]
    assert not does_group or one_worker_for_each(used, "group")
    ups = record.check(servers=tests + len(modules) + 2)
    assert {up.client for up in ups} == clients


CRASH = """
def test_crash(own, of_module, shared):
    wait_for_note("other is up")
    if not RECORD.notes("crash"):
        note("crash")
        {crash}

def test_replacement(own, of_module, shared):
    (crash,) = RECORD.notes("crash")
    assert crash["client"] != os.getpid()
    lost = [up for up in RECORD.ups() if up.client == crash["client"]]
    assert len(lost) == 3
    processes.wait_gone([who for up in lost for who in up.people], 20.0)
    assert all(map(answers, [own, of_module, shared]))
    note("replaced")
"""
OTHER_GOES_ON = """
def test_other(own, shared):
    note("other is up")
    wait_for_note("replaced")
    assert answers(own)
    note("other", pids=[own.pid, shared.pid])

@pytest.mark.parametrize("number", range(3))
def test_other_goes_on(own, shared, number):
    (before,) = RECORD.notes("other")
    assert shared.pid == before["pids"][1]
    assert answers(shared)
"""


@pytest.mark.parametrize("crash", ["os._exit(3)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_worker_that_crashes_is_replaced(pytester: pytest.Pytester, record: Record, crash: str) -> None:
    pytester.makepyfile(test_crash=IMPORTS + CRASH.format(crash=crash), test_other=IMPORTS + OTHER_GOES_ON)
    result = run(pytester, "-n", "2", TWO_MODULES)
    outcomes = result.parseoutcomes()
    # Some versions of xdist run the test that crashed once more when they distribute by scope.
    assert (outcomes["failed"], outcomes["passed"]) in {(1, 5), (1, 6)}
    result.stdout.fnmatch_lines(["*worker 'gw?' crashed while running 'test_crash.py::test_crash'*"])
    assert len({up.client for up in record.check()}) == 3


FAILS = """
def test_fail(own, shared):
    wait_for_note("other is up")
    note("failing")
    raise AssertionError("it fails")

def test_not_run(own):
    note("not to be run")
"""
OTHER_ENDS = """
def test_other(own, shared):
    note("other is up")
    wait_for_note("failing")
    time.sleep(1.0)  # until xdist has told this worker to end

def test_that_may_be_run(own):
    assert answers(own)
"""


@pytest.mark.parametrize("option", ["-x", "--maxfail=1"])
def test_a_run_that_ends_at_the_first_failure(pytester: pytest.Pytester, record: Record, option: str) -> None:
    pytester.makepyfile(test_fails=IMPORTS + FAILS, test_other=IMPORTS + OTHER_ENDS)
    result = run(pytester, "-n", "2", TWO_MODULES, option)
    result.stdout.fnmatch_lines(["*stopping after 1 failures*"])
    assert result.parseoutcomes()["failed"] == 1
    assert not record.notes("not to be run")
    record.check()


FAILS_ONCE = """
@pytest.mark.parametrize("number", range(4))
def test_servers(own, of_module, shared, number):
    assert all(map(answers, [own, of_module, shared]))
    note("ran", number=number)
    assert number != 2 or RECORD.is_marked("mended")
"""


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["plain", "xdist"])
@pytest.mark.parametrize("option", ["--lf", "--ff"])
def test_a_second_run_begins_with_what_failed(
    pytester: pytest.Pytester, record: Record, option: str, workers: tuple[str, ...]
) -> None:
    pytester.makepyfile(IMPORTS + FAILS_ONCE)
    run(pytester, *workers).assert_outcomes(passed=3, failed=1)
    record.check()
    first = len(record.notes("ran"))
    record.mark("mended")
    result = run(pytester, option, *workers)
    result.assert_outcomes(passed=1 if option == "--lf" else 4)
    record.check()
    again = [ran["number"] for ran in record.notes("ran")[first:]]
    assert sorted(again) == ([2] if option == "--lf" else [0, 1, 2, 3])
    assert workers or again[0] == 2
