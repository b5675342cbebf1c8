"""Stops that overlap, are interrupted, or meet a launch: each goes on, leaves nothing, and tells what happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from faults.pending import Pending
from faults.runs import GATE, STUBBORN, TREE_SERVER, Watched
from processes import identities, is_running, wait_for

import harness
from harness import procfs
from harness.forking import WatchdogProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from faults.conftest import StartRun

TIMEOUT_S = 30.0


def launch(owner: harness.Watchdog | harness.ServerGroup, marks: Path, *options: str, grace_s: float) -> harness.Server:
    command = [sys.executable, "-I", "-S", str(TREE_SERVER), str(marks), *options]
    server = owner.launch(command, ready=harness.log_line("ready"), grace_s=grace_s)
    return server.wait_ready(timeout_s=TIMEOUT_S)


def wait_until(server: harness.Server, state: str) -> None:
    wait_for(lambda: server.state == state, TIMEOUT_S, state)


# ---- Ctrl-C


def handled(pid: int) -> bool:
    """Say whether the interrupt that was sent has been taken, and the process waits for something again."""
    with open(f"/proc/{pid}/status", encoding="utf-8") as status:
        lines = dict(line.split(":\t", 1) for line in status)
    is_pending = (int(lines["SigPnd"], 16) | int(lines["ShdPnd"], 16)) >> (signal.SIGINT - 1) & 1
    return not is_pending and lines["State"][0] == "S"


SCRIPT = """
    import sys
    import harness

    with harness.Watchdog() as watchdog:
        with watchdog.group() as group:
            for _ in range(2):
                group.launch({command!r}, ready=harness.log_line("ready"), grace_s=6.0)
            group.wait_ready(timeout_s=60)
            print(watchdog.pid, *[pid for server in group.servers for pid in server.pids()], flush=True)
            for attempt in range({interrupts}):
                try:
                    print("stopping", flush=True)
                    group.stop()
                except KeyboardInterrupt:
                    pass
            report = group.stop()
        print([(outcome.how, outcome.returncode, outcome.seconds >= 6.0) for outcome in report.outcomes])
        print(watchdog.close().is_clean)
"""


@pytest.mark.parametrize("interrupts", [1, 2])
def test_ctrl_c_during_a_stop_in_a_script(tmp_path: Path, bystander: int, interrupts: int) -> None:
    command = [sys.executable, "-I", "-S", str(TREE_SERVER), str(tmp_path), "--ignore"]
    script = textwrap.dedent(SCRIPT).format(command=command, interrupts=interrupts)
    environment = {**os.environ, "HARNESS_STATE_DIR": str(tmp_path / "state")}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment, text=True, start_new_session=True
    ) as client:
        assert client.stdout is not None
        with Watched([int(pid) for pid in client.stdout.readline().split()]) as watched, Watched([bystander]) as others:
            for _ in range(interrupts):
                assert client.stdout.readline() == "stopping\n"
                wait_for(lambda: bool(list(tmp_path.glob("asked-*"))), TIMEOUT_S, "they are asked")
                wait_for(lambda: handled(client.pid), TIMEOUT_S, "it waits for the stop")
                client.send_signal(signal.SIGINT)
            rest = client.stdout.read()
            assert client.wait(TIMEOUT_S) == 0
            assert rest == f"{[('killed', -9, True)] * 2}\nTrue\n"
            assert watched.alive() == []
            assert others.alive() == [bystander]


@pytest.mark.parametrize("interrupts", [1, 2, 3])
def test_ctrl_c_during_a_teardown_in_pytest(start_run: StartRun, interrupts: int) -> None:
    run = start_run(ending=GATE + "pass", servers=[STUBBORN] * 2, grace_s=8.0)
    (up,) = run.ups()
    with Watched([up.watchdog, *up.keepers, *up.server_pids]) as watched:
        run.go()
        wait_for(lambda: len(run.asked()) >= 2, TIMEOUT_S, "they are asked")
        for _ in range(interrupts):
            wait_for(lambda: run.process.poll() is not None or handled(up.client), TIMEOUT_S, "the interrupt is taken")
            if run.process.poll() is None:
                run.process.send_signal(signal.SIGINT)
        assert run.end(30.0) != 0
        assert watched.wait_gone(3.0) == []


# ---- a second stop while the first runs


def test_stops_of_overlapping_servers(guarded: harness.Watchdog, tmp_path: Path) -> None:
    first, shared, last = (launch(guarded, tmp_path, "--ignore", grace_s=60.0) for _ in range(3))
    with ThreadPoolExecutor(1) as pool:
        both = pool.submit(guarded.stop, [first, shared])
        wait_until(shared, "asked")
        report = guarded.stop([shared, last], grace_s=0.3)
        assert [outcome.how for outcome in report.outcomes] == ["killed", "killed"]
        assert first.state == "asked"
        assert not both.done()
        assert guarded.stop([first], grace_s=0.1).outcomes[0].how == "killed"
        assert [outcome.how for outcome in both.result(TIMEOUT_S).outcomes] == ["killed", "killed"]
        assert both.result().outcomes[1] == report.outcomes[0]
    assert {first.state, shared.state, last.state} == {"gone"}


def test_a_second_stop_with_a_longer_grace_does_not_lengthen_the_first(
    guarded: harness.Watchdog, tmp_path: Path
) -> None:
    server = launch(guarded, tmp_path, "--ignore", grace_s=60.0)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.stop, grace_s=3.0)
        wait_until(server, "asked")
        second = server.stop(grace_s=50.0)
        assert second == first.result(TIMEOUT_S)
    assert (second.how, second.seconds < 20.0) == ("killed", True)


def test_many_threads_stop_the_same_servers(guarded: harness.Watchdog, tmp_path: Path) -> None:
    group = guarded.group()
    for _ in range(3):
        launch(group, tmp_path, "--ignore", grace_s=0.5)
    with ThreadPoolExecutor(8) as pool:
        stops = [pool.submit(group.stop) for _ in range(4)]
        kills = [pool.submit(server.kill) for server in group.servers]
        reports = [stop.result(TIMEOUT_S) for stop in stops]
        outcomes = tuple(kill.result(TIMEOUT_S) for kill in kills)
    assert {report.outcomes for report in reports} == {outcomes}
    assert {outcome.how for outcome in outcomes} == {"killed"}


# ---- a stop that meets a launch


@pytest.fixture
def pending(tmp_path: Path) -> Iterator[Pending]:
    with Pending(tmp_path) as held:
        yield held


def roots(watchdog: harness.Watchdog) -> list[int]:
    """Give the roots that the keepers of a watchdog have forked."""
    keepers = procfs.children(watchdog.pid or 0)
    return [pid for keeper in keepers for pid in procfs.children(keeper)]


def test_close_while_a_launch_hangs_before_its_program(guarded: harness.Watchdog, pending: Pending) -> None:
    with ThreadPoolExecutor(1) as pool:
        launching = pool.submit(guarded.launch, pending.command, grace_s=0.3)
        wait_for(lambda: bool(roots(guarded)), TIMEOUT_S, "its root is forked")
        with Watched(roots(guarded)) as watched:
            began = time.monotonic()
            report = guarded.close()
            assert time.monotonic() - began < 6.0
            assert watched.alive() == []
        with pytest.raises(harness.LaunchFailed, match="before its program was executed"):
            launching.result(TIMEOUT_S)
    assert report.is_clean


def test_an_interrupted_launch_that_hangs_before_its_program_is_killed(
    guarded: harness.Watchdog, pending: Pending
) -> None:
    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)

    def interrupt_launch() -> None:
        _wait_for_root(guarded)
        os.kill(os.getpid(), signal.SIGALRM)

    sender = threading.Thread(target=interrupt_launch)
    try:
        sender.start()
        with pytest.raises(KeyboardInterrupt):
            guarded.launch(pending.command, grace_s=60.0)
    finally:
        signal.signal(signal.SIGALRM, previous)
        sender.join()
    assert roots(guarded) == []


def _wait_for_root(watchdog: harness.Watchdog) -> None:
    wait_for(lambda: bool(roots(watchdog)), TIMEOUT_S, "its root is forked")


def test_leaving_a_group_while_a_launch_hangs_before_its_program(guarded: harness.Watchdog, pending: Pending) -> None:
    with ThreadPoolExecutor(1) as pool:
        with guarded.group() as group:
            launching = pool.submit(group.launch, pending.command, grace_s=0.3)
            _wait_for_root(guarded)
        pending.let_go()
        with pytest.raises(harness.HarnessError, match=r"was left while .* was launching: it has been stopped"):
            launching.result(TIMEOUT_S)
    assert roots(guarded) == []


def test_close_while_a_stop_runs(guarded: harness.Watchdog, tmp_path: Path) -> None:
    server = launch(guarded, tmp_path, "--ignore", grace_s=3.0)
    other = launch(guarded, tmp_path, grace_s=30.0)
    with ThreadPoolExecutor(1) as pool:
        stop = pool.submit(guarded.stop, [server])
        wait_until(server, "asked")
        report = guarded.close()
        assert stop.result(TIMEOUT_S).outcomes == report.outcomes[:1]
    assert [outcome.how for outcome in report.outcomes] == ["killed", "asked"]
    assert (server.state, other.state) == ("gone", "gone")
    assert guarded.close() == report


def test_launches_while_it_closes_are_refused_or_stopped(guarded: harness.Watchdog, tmp_path: Path) -> None:
    slow = launch(guarded, tmp_path, "--ignore", grace_s=0.7)
    launched: list[harness.Server] = []

    def launch_on() -> None:
        while True:
            launched.append(guarded.launch(["sleep", "1000"], grace_s=0.5))

    with ThreadPoolExecutor(3) as pool:
        loops = [pool.submit(launch_on) for _ in range(3)]
        wait_for(lambda: len(launched) >= 3, TIMEOUT_S, "they launch")
        report = guarded.close()
        for loop in loops:
            error = loop.exception(TIMEOUT_S)
            assert type(error) is harness.HarnessError  # and not WatchdogDied
            assert "it starts nothing more" in str(error) or "has been closed" in str(error)
    assert report.is_clean
    assert slow.state == "gone"
    assert not [server for server in launched if server.is_alive]
    names = {outcome.name for outcome in report.outcomes}
    assert {server.name for server in launched} <= names
    with pytest.raises(harness.HarnessError, match="has been closed"):
        guarded.launch(["true"])


def test_a_request_that_comes_when_the_pipe_is_closed_already(
    guarded: harness.Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[harness.HarnessError] = []
    end = WatchdogProcess.end

    def launch_and_end(process: WatchdogProcess, timeout_s: float = 0.0) -> None:
        with pytest.raises(harness.HarnessError) as caught:
            guarded.launch(["true"])
        errors.append(caught.value)
        end(process, timeout_s)

    guarded.launch(["true"])
    monkeypatch.setattr(WatchdogProcess, "end", launch_and_end)
    guarded.close()
    assert [(type(error), str(error)) for error in errors] == [(harness.HarnessError, "this watchdog has been closed")]


def test_close_from_many_threads(guarded: harness.Watchdog, tmp_path: Path) -> None:
    launch(guarded, tmp_path, "--ignore", grace_s=0.4)
    with ThreadPoolExecutor(4) as pool:
        reports = {closing.result(TIMEOUT_S) for closing in [pool.submit(guarded.close) for _ in range(4)]}
    assert len(reports) == 1
    assert [outcome.how for outcome in reports.pop().outcomes] == ["killed"]


# ---- a server that ends at the worst moment


def test_servers_that_exit_around_the_end_of_their_grace(guarded: harness.Watchdog, tmp_path: Path) -> None:
    stop_s = [0.35 + 0.02 * number for number in range(16)]
    servers = [
        guarded.launch(
            [sys.executable, "-I", "-S", str(TREE_SERVER), str(tmp_path), "--stop-s", str(seconds)],
            ready=harness.log_line("ready"),
            grace_s=0.5,
        )
        for seconds in stop_s
    ]
    for server in servers:
        server.wait_ready(timeout_s=TIMEOUT_S)
    trees = identities(pid for server in servers for pid in server.pids())
    report = guarded.stop(servers)
    assert not [who for who in trees if is_running(who)]
    for outcome in report.outcomes:
        # The root is asked first, and what it leaves after it has gone: that may be killed where the root was not.
        assert (outcome.how, outcome.returncode) in {("asked", 0), ("killed", 0), ("killed", -9)}
    assert report.is_clean
    assert guarded.stop(servers).outcomes == report.outcomes


# ---- a server of another user


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process that becomes another user")
@pytest.mark.parametrize("end", ["stop", "kill", "keeper", "watchdog"])
def test_a_server_that_becomes_another_user(guarded: harness.Watchdog, tmp_path: Path, end: str) -> None:
    tmp_path.chmod(0o777)
    server = launch(guarded, tmp_path, "--ignore", "--uid", "65534", grace_s=0.3)
    found = procfs.stat(server.pid)
    assert found is not None
    assert os.stat(f"/proc/{server.pid}").st_uid == 65534
    ends: dict[str, Callable[[], object]] = {
        "stop": server.stop,
        "kill": server.kill,
        "keeper": lambda: os.kill(found.parent, signal.SIGKILL),
        "watchdog": lambda: os.kill(guarded.pid or 0, signal.SIGKILL),
    }
    with Watched(server.pids()) as watched:
        ends[end]()
        assert watched.wait_gone(10.0) == []
