"""Ending servers: asked, killed, exited; what a root leaves behind; many at once; and `Server.proc`."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import processes
import pytest
from servers.commands import READY_S, STUBBORN, family, member, pid_of, said, time_of

import harness
from harness import procfs

if TYPE_CHECKING:
    from pathlib import Path

READY = harness.log_line("(^|root )ready")


def start(
    watchdog: harness.Watchdog, command: list[str], *, ask: str = "root", grace_s: float = 15.0
) -> harness.Server:
    return watchdog.launch(command, ready=READY, ask=ask, grace_s=grace_s).wait_ready(READY_S)


def state_of(pid: int) -> str:
    found = procfs.stat(pid)
    return "" if found is None else found.state


@pytest.mark.parametrize(
    ("command", "how", "returncode"),
    [
        (["sh", "-c", "echo ready; exec sleep 60"], "asked", -15),
        (family(member(code=0)), "asked", 0),
        (family(member(code=7)), "asked", 7),
        (STUBBORN, "killed", -9),
        (["sh", "-c", "echo ready; kill -STOP $$"], "killed", -9),
    ],
)
def test_a_stop_says_how_the_server_ended(
    watchdog: harness.Watchdog, command: list[str], how: str, returncode: int
) -> None:
    server = start(watchdog, command, grace_s=0.3 if how == "killed" else 15.0)
    if command[-1].endswith("kill -STOP $$"):
        processes.wait_for(lambda: state_of(server.pid) == "T", READY_S, "it has stopped itself")
    pids = server.pids()
    outcome = server.stop()
    assert (outcome.how, outcome.returncode, outcome.survivors) == (how, returncode, ())
    assert (outcome.name, outcome.pid) == (server.name, server.pid)
    assert (server.state, server.returncode, server.is_alive) == ("gone", returncode, False)
    assert not [pid for pid in pids if processes.identify(pid)]
    assert outcome.seconds >= (0.3 if how == "killed" else 0.0)
    assert server.stop() == server.kill() == server.wait() == outcome
    server.send_signal(signal.SIGTERM)


def test_a_grace_is_kept_and_not_exceeded(watchdog: harness.Watchdog) -> None:
    patient = start(watchdog, family(member(takes_s=0.4)), grace_s=30.0)
    assert (patient.stop().how, patient.returncode) == ("asked", 0)
    hasty = start(watchdog, family(member(takes_s=30.0)), grace_s=30.0)
    outcome = hasty.stop(grace_s=0.2)
    assert (outcome.how, outcome.returncode) == ("killed", -9)
    assert 0.2 <= outcome.seconds < 20.0


def test_a_kill_does_not_ask(watchdog: harness.Watchdog) -> None:
    server = start(watchdog, family(member("root", member("child"))))
    outcome = server.kill()
    assert (outcome.how, outcome.returncode) == ("killed", -9)
    assert said(server, "root", "asked") == said(server, "child", "asked") == []


def test_a_stop_that_waits_is_overtaken_by_a_shorter_one_and_by_a_kill(watchdog: harness.Watchdog) -> None:
    servers = [start(watchdog, STUBBORN, grace_s=60.0) for _ in range(2)]
    waits = [threading.Thread(target=server.stop) for server in servers]
    for wait in waits:
        wait.start()
    for server in servers:
        processes.wait_for(lambda server=server: server.state == "asked", READY_S, "asked")  # type: ignore[misc]
    assert servers[0].stop(grace_s=0.1).seconds < 30.0
    assert servers[1].kill().seconds < 30.0
    for wait in waits:
        wait.join()
    assert [server.stop().how for server in servers] == ["killed", "killed"]


def test_a_signal_reaches_the_root_alone(watchdog: harness.Watchdog) -> None:
    server = start(watchdog, family(member("root", member("child", term="note"), term="note")), grace_s=0.1)
    server.send_signal(signal.SIGTERM)
    processes.wait_for(lambda: bool(said(server, "root", "asked")), READY_S, "the root's SIGTERM")
    assert said(server, "child", "asked") == []
    server.send_signal(0)  # as subprocess.Popen, which only looks whether it can
    for wrong in (10_000, -1, True):
        with pytest.raises(harness.SpecError, match="is not a signal"):
            server.send_signal(wrong)
    assert server.state == "running"


@pytest.mark.parametrize(("ask", "asked"), [("root", 0), ("group", 1)])
def test_whom_a_stop_asks(watchdog: harness.Watchdog, ask: str, asked: int) -> None:
    # The root outlives its child's SIGTERM, so that only the first asking is seen; then both are killed.
    plan = member("root", member("child", term="note"), member("daemon", term="note", daemon=True), term="note")
    server = start(watchdog, family(plan), ask=ask, grace_s=3.0)
    assert server.stop().how == "killed"
    assert len(said(server, "root", "asked")) == 1
    assert len(said(server, "child", "asked")) == asked
    assert said(server, "daemon", "asked") == []


def test_what_a_root_leaves_is_asked_and_gets_what_is_left_of_the_grace(watchdog: harness.Watchdog) -> None:
    plan = member("root", member("quick", takes_s=0.2), member("slow", takes_s=30.0), takes_s=0.3)
    server = start(watchdog, family(plan), grace_s=5.0)
    outcome = server.stop()
    assert (outcome.how, outcome.returncode) == ("killed", 0)
    assert 5.0 <= outcome.seconds < 25.0
    for name in ("quick", "slow"):
        assert time_of(server, name, "asked") >= time_of(server, "root", "ends")
    assert len(said(server, "quick", "ends")) == 1
    assert said(server, "slow", "ends") == []


def test_an_outcome_says_when_the_root_exited_and_not_when_the_rest_was_stopped(watchdog: harness.Watchdog) -> None:
    before = time.monotonic()
    server = start(watchdog, ["sh", "-c", "sleep 60 & echo ready; exit 0"])
    assert server.wait_until("exit", READY_S)
    after = time.monotonic()
    exited_at = server.stop().exited_at
    assert exited_at is not None
    assert before <= exited_at <= after
    assert server.status().exited_at == exited_at


def test_each_level_of_a_tree_is_asked_when_the_one_above_has_ended(watchdog: harness.Watchdog) -> None:
    server = start(watchdog, family(member("root", member("child", member("grandchild", takes_s=0.1)))))
    assert server.stop().how == "asked"
    times = [time_of(server, name, "asked") for name in ("root", "child", "grandchild")]
    assert times == sorted(times)
    assert [len(said(server, name, "asked")) for name in ("root", "child", "grandchild")] == [1, 1, 1]


def test_a_daemon_that_ignores_sigterm_is_killed(watchdog: harness.Watchdog) -> None:
    plan = member("root", member("daemon", member("worker", term="ignore", daemon=True), term="ignore", daemon=True))
    server = start(watchdog, family(plan), grace_s=3.0)
    outcome = server.stop()
    assert (outcome.how, outcome.returncode) == ("killed", 0)
    assert not [name for name in ("daemon", "worker") if processes.identify(pid_of(server, name))]


def test_a_tree_that_forks_while_it_is_killed(watchdog: harness.Watchdog) -> None:
    breeder = 'trap "" TERM; echo ready; while :; do sleep 60 & (sleep 60 &) ; read -r _ < /proc/uptime; done'
    server = start(watchdog, ["sh", "-c", breeder], grace_s=0.1)
    outcome = server.stop()
    assert (outcome.how, outcome.survivors) == ("killed", ())


def test_a_stop_takes_as_long_as_the_slowest(watchdog: harness.Watchdog) -> None:
    servers = [watchdog.launch(family(member(takes_s=2.0)), ready=harness.log_line("^root ready")) for _ in range(4)]
    for server in servers:
        server.wait_ready(READY_S)
    began = time.monotonic()
    report = watchdog.stop(servers)
    took_s = time.monotonic() - began
    slowest_s = max(time_of(s, "root", "ends") - time_of(s, "root", "asked") for s in servers)
    assert [(outcome.how, outcome.returncode) for outcome in report.outcomes] == [("asked", 0)] * 4
    assert slowest_s <= report.seconds <= took_s
    assert took_s < 5.0  # one after the other they would take 8 s and more
    asked = [time_of(server, "root", "asked") for server in servers]
    assert max(asked) < min(time_of(server, "root", "ends") for server in servers)


def test_a_report_of_nothing_and_of_servers_stopped_before(watchdog: harness.Watchdog) -> None:
    empty = watchdog.stop([])
    assert (empty.outcomes, empty.seconds, empty.survivors, empty.gpu, empty.is_clean) == ((), 0.0, (), None, True)
    stopped, running = (watchdog.launch(["sleep", "60"], name=name) for name in ("stopped", "running"))
    before = stopped.stop()
    report = watchdog.stop(iter([stopped, running, stopped, running]))
    assert [outcome.name for outcome in report.outcomes] == ["stopped", "running"]
    assert report.outcomes[0] == before
    assert watchdog.stop([stopped, running]).outcomes == report.outcomes
    assert report.raise_if_leaked() is None  # type: ignore[func-returns-value]  # that it does not raise is the point


def test_a_stop_with_its_own_grace(watchdog: harness.Watchdog) -> None:
    servers = [start(watchdog, STUBBORN, grace_s=60.0) for _ in range(3)]
    report = watchdog.stop(servers, grace_s=0.2)
    assert [outcome.how for outcome in report.outcomes] == ["killed"] * 3
    assert 0.2 <= report.seconds < 10.0
    for wrong in (0, -1.0, float("inf"), True):
        with pytest.raises(harness.SpecError, match="grace_s must be"):
            watchdog.stop(servers, grace_s=wrong)


def test_another_watchdogs_server_is_refused(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    mine = watchdog.launch(["sleep", "60"])
    with harness.Watchdog(state_dir=tmp_path / "other") as other:
        foreign = other.launch(["sleep", "60"], name="foreign")
        with pytest.raises(harness.SpecError, match=r"'foreign'.* is not a server of this watchdog"):
            watchdog.stop([mine, foreign])
        assert mine.state == foreign.state == "running"


def test_closing_reports_every_server(watchdog: harness.Watchdog) -> None:
    own = [watchdog.launch(["sleep", "60"]), start(watchdog, STUBBORN, grace_s=0.2), watchdog.launch(["true"])]
    own[2].wait(READY_S)
    report = watchdog.close()
    assert [(outcome.how, outcome.returncode) for outcome in report.outcomes] == [
        ("asked", -15),
        ("killed", -9),
        ("exited", 0),
    ]
    assert report.is_clean
    assert report.seconds >= 0.2
    assert [server.state for server in own] == ["gone"] * 3
    assert watchdog.close() == report
    assert not watchdog.is_alive


# ---- Server.proc


def test_proc_is_like_popen(watchdog: harness.Watchdog) -> None:
    server = start(watchdog, family(member("root", member("child", term="note"), code=5)), grace_s=0.2)
    proc = server.proc
    assert isinstance(proc, harness.ServerProcess)
    assert (proc.pid, proc.poll(), proc.returncode) == (server.pid, None, None)
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        proc.wait(timeout=0.05)
    assert caught.value.timeout == 0.05
    with pytest.raises(subprocess.TimeoutExpired):
        proc.wait(0)
    proc.terminate()
    assert proc.wait(READY_S) == 5  # the root's exit, though its child lives on
    assert (proc.poll(), proc.returncode, server.state) == (5, 5, "detached")
    assert proc.wait() == 5
    for late in (proc.terminate, proc.kill):
        late()
    assert server.stop().how == "killed"


def test_proc_kills_and_signals_the_root(watchdog: harness.Watchdog) -> None:
    killed, told = (start(watchdog, ["sh", "-c", "echo ready; exec sleep 60"]).proc for _ in range(2))
    killed.kill()
    told.send_signal(signal.SIGUSR1)
    assert (killed.wait(READY_S), told.wait(READY_S)) == (-9, -10)


def test_proc_can_be_used_when_everything_is_over(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(["sleep", "60"])
    watchdog.close()
    assert (server.proc.poll(), server.proc.wait(1.0)) == (-15, -15)
    server.proc.terminate()
    server.proc.kill()
