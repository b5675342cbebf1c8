"""However pytest, or a worker of pytest-xdist, ends: every process of every server is asked, then killed, and gone."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from faults.runs import GATE, POLITE, STUBBORN, Run, Up, Watched

if TYPE_CHECKING:
    from collections.abc import Callable

    from faults.conftest import StartRun

PLAIN: tuple[str, ...] = ("-p", "no:xdist")
XDIST = ("-n", "2", "--dist", "load")
# How long until everything must be gone: the crash grace of 2 s, and time to spare on a busy machine.
GONE_S = 12.0


def check_gone(run: Run, ups: list[Up], watched: Watched, *, within_s: float = GONE_S) -> None:
    alive = watched.wait_gone(within_s)
    assert alive == [], f"{alive} of {ups} survive\n{run.text()}"
    roots = {up.trees[0][0] for up in ups}
    assert roots <= run.asked(), "a polite server was killed without having been asked"
    stubborn = {pid for up in ups for pid in up.trees[1]}
    assert {up.trees[1][0] for up in ups} <= run.asked() & stubborn


def everything(ups: list[Up]) -> list[int]:
    own = {pid for up in ups for pid in (up.watchdog, *up.keepers, *up.server_pids)}
    assert all(len(tree) == 3 for up in ups for tree in up.trees), ups
    return sorted(own)


@pytest.mark.parametrize("options", [PLAIN, XDIST], ids=["plain", "xdist"])
@pytest.mark.parametrize(
    "ending",
    [
        "pass",
        "assert False",
        "pytest.exit('enough')",
        "os._exit(3)",
        "os.kill(os.getpid(), signal.SIGSEGV)",
        "os.abort()",
    ],
)
def test_the_test_ends_the_process(start_run: StartRun, options: tuple[str, ...], ending: str) -> None:
    run = start_run(*options, ending=GATE + ending, tests=2 if options is XDIST else 1, grace_s=2.0)
    ups = run.ups()
    with Watched(everything(ups)) as watched:
        run.go()
        check_gone(run, ups, watched)
        code = run.end()
    assert (code == 0) == (ending == "pass"), run.text()


@pytest.mark.parametrize("method", ["thread", "signal"])
@pytest.mark.parametrize("options", [PLAIN, XDIST], ids=["plain", "xdist"])
def test_pytest_timeout(start_run: StartRun, options: tuple[str, ...], method: str) -> None:
    run = start_run(*options, "--timeout=12", f"--timeout-method={method}", tests=len(options) // 2, grace_s=2.0)
    ups = run.ups()
    with Watched(everything(ups)) as watched:
        check_gone(run, ups, watched, within_s=12 + GONE_S)
        assert run.end() != 0


def signal_pytest(run: Run, _up: Up, number: int) -> None:
    os.kill(run.process.pid, number)


def signal_worker(_run: Run, up: Up, number: int) -> None:
    os.kill(up.client, number)


def signal_group(run: Run, _up: Up, number: int) -> None:
    os.killpg(run.process.pid, number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
@pytest.mark.parametrize(
    ("options", "send"),
    [(PLAIN, signal_pytest), (XDIST, signal_pytest), (XDIST, signal_worker), (XDIST, signal_group)],
    ids=["plain", "controller", "worker", "whole-group"],
)
def test_a_signal_ends_pytest(
    start_run: StartRun, options: tuple[str, ...], send: Callable[[Run, Up, int], None], number: int
) -> None:
    run = start_run(*options, tests=2 if options is XDIST else 1)
    ups = run.ups()
    # A worker that is killed takes its own servers with it; the other worker's run on, so only its are looked at.
    hit = ups if send is not signal_worker else ups[:1]
    with Watched(everything(hit)) as watched:
        send(run, ups[0], number)
        check_gone(run, hit, watched)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("options", [PLAIN, XDIST], ids=["plain", "xdist"])
def test_ctrl_c(start_run: StartRun, options: tuple[str, ...], times: int) -> None:
    """The second Ctrl-C comes while the first one's teardown waits for a server that ignores SIGTERM."""
    run = start_run(*options, tests=2 if options is XDIST else 1, grace_s=2.0)
    ups = run.ups()
    with Watched(everything(ups)) as watched:
        os.killpg(run.process.pid, signal.SIGINT)
        if times == 2:
            with Watched([ups[0].trees[0][0]]) as polite:
                assert polite.wait_gone(GONE_S) == []
            os.killpg(run.process.pid, signal.SIGINT)
        check_gone(run, ups, watched)
        assert run.end() != 0


def test_ctrl_c_with_eight_slow_servers_in_one_worker(start_run: StartRun) -> None:
    """One after another they would take 16 s, and execnet kills the worker 10 s after the Ctrl-C."""
    slow = ("--stop-s", "2.0")
    run = start_run("-n", "1", servers=[slow] * 8, grace_s=6.0, crash_grace_s=5.0)
    ups = run.ups()
    pids = everything(ups)
    with Watched(pids) as watched:
        os.killpg(run.process.pid, signal.SIGINT)
        assert watched.wait_gone(15.0) == []
    assert {tree[0] for tree in ups[0].trees} <= run.asked()


@pytest.mark.parametrize("options", [PLAIN, ("-n", "1")], ids=["plain", "xdist"])
def test_the_watchdog_is_killed(start_run: StartRun, options: tuple[str, ...]) -> None:
    run = start_run(*options, ending=GATE + "pass")
    ups = run.ups()
    with Watched(everything(ups)) as watched:
        os.kill(ups[0].watchdog, signal.SIGKILL)
        check_gone(run, ups, watched)
        run.go()
        assert run.end() == 1
    assert "the watchdog" in run.text()
    assert "has died (killed by SIGKILL)" in run.text()
    assert "INTERNALERROR" not in run.text()


@pytest.mark.parametrize("options", [PLAIN, ("-n", "1")], ids=["plain", "xdist"])
def test_a_keeper_is_killed(start_run: StartRun, options: tuple[str, ...]) -> None:
    """The kernel ends its root at once, and what is below re-parents to the watchdog, which asks and kills it."""
    run = start_run(*options, grace_s=2.0)
    ups = run.ups()
    first, second = ups[0].trees
    with Watched([*first, ups[0].keepers[0]]) as hit, Watched([*second, ups[0].keepers[1], ups[0].watchdog]) as rest:
        os.kill(ups[0].keepers[0], signal.SIGKILL)
        assert hit.wait_gone(GONE_S) == []
        assert set(first[1:]) <= run.asked()
        assert rest.alive() == [*second, ups[0].keepers[1], ups[0].watchdog], "another server was harmed"
        os.killpg(run.process.pid, signal.SIGINT)
        assert rest.wait_gone(20.0) == []
        run.end()


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("options", [PLAIN, ("-n", "1")], ids=["plain", "xdist"])
def test_a_stop_goes_on_when_the_test_process_hangs_or_dies(
    start_run: StartRun, options: tuple[str, ...], number: int
) -> None:
    """The polite server's end shows that the stop was sent; then the test process is stopped or killed."""
    run = start_run(*options, ending=GATE + "server_group.stop(grace_s=2.0)", servers=[POLITE, STUBBORN])
    ups = run.ups()
    up = ups[0]
    polite_root = up.trees[0][0]
    with Watched(up.server_pids) as watched, Watched([polite_root]) as polite, Watched([up.watchdog]) as watchdog:
        run.go()
        assert polite.wait_gone(GONE_S) == []
        os.kill(up.client, number)
        check_gone(run, ups, watched)
        if number == signal.SIGSTOP:
            os.kill(up.client, signal.SIGKILL)
        assert watchdog.wait_gone(GONE_S) == []


def test_sigterm_to_the_watchdog_is_the_second_entrance(start_run: StartRun) -> None:
    """The test process hangs for good; the watchdog is told to end, stops everything, and ends."""
    run = start_run(*PLAIN, ending="os.kill(os.getpid(), signal.SIGSTOP)")
    ups = run.ups()
    with Watched(everything(ups)) as watched:
        os.kill(ups[0].watchdog, signal.SIGTERM)
        # The watchdog itself stays a zombie until the stopped test process reaps it; its pidfd is readable before.
        check_gone(run, ups, watched)
