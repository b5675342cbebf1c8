"""Adopted servers: processes that the test process forked itself."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import processes
import pytest
from servers.commands import READY_S, STUBBORN, family, member

import harness

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def forked(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a process of this test's own, wait for the line that says it is ready, and reap it in the end."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            while not process.stdout.readline().startswith(("ready", "root ready")):
                assert process.poll() is None
            yield process
        finally:
            process.kill()


def test_an_adopted_server_is_asked(watchdog: harness.Watchdog) -> None:
    with forked(["sh", "-c", "echo ready; exec sleep 60"]) as process:
        server = watchdog.adopt(process.pid)
        assert (server.name, server.pid, server.grace_s) == (f"adopted-{process.pid}", process.pid, 15.0)
        assert server.pgid == os.getpgid(process.pid)
        assert (server.state, server.is_alive, server.returncode) == ("running", True, None)
        assert server.pids() == [process.pid]
        assert (server.ports, server.log_tail()) == ({}, "")
        with pytest.raises(harness.HarnessError, match="was adopted: the harness holds no port"):
            _ = server.port
        assert server.wait_ready() is server
        assert server in watchdog.servers
        outcome = watchdog.stop([server]).outcomes[0]
        assert (outcome.how, outcome.returncode) == ("asked", None)  # its parent alone can know
        assert process.wait(READY_S) == -15
        assert (server.state, server.pids()) == ("gone", [])
        assert server.stop() == outcome


def test_an_adopted_tree_is_stopped_as_a_whole(watchdog: harness.Watchdog) -> None:
    plan = member("root", member("child", member("deep", term="ignore")), member("daemon"), takes_s=0.1)
    with forked(family(plan)) as process:
        server = watchdog.adopt(process.pid, name="mine", grace_s=0.5)
        people = processes.identities(server.pids())
        assert len(people) == 4
        outcome = server.stop()
        assert (outcome.name, outcome.how) == ("mine", "killed")
        assert not [who for who in people if processes.is_running(who)]


def test_an_adopted_server_that_ignores_sigterm_is_killed(watchdog: harness.Watchdog) -> None:
    with forked(STUBBORN) as process:
        outcome = watchdog.adopt(process.pid, grace_s=60.0).stop(grace_s=0.2)
        assert outcome.how == "killed"
        assert outcome.seconds >= 0.2
        assert process.wait(READY_S) == -9


def test_kill_and_signal(watchdog: harness.Watchdog) -> None:
    with forked(STUBBORN) as first, forked(["sh", "-c", "echo ready; exec sleep 60"]) as second:
        killed, told = watchdog.adopt(first.pid), watchdog.adopt(second.pid)
        assert killed.kill().how == "killed"
        told.send_signal(10)
        assert told.wait(READY_S).how == "exited"
        assert (first.wait(READY_S), second.wait(READY_S)) == (-9, -10)
        assert told.proc.wait(READY_S) is None


def test_an_adopted_server_exits_by_itself(watchdog: harness.Watchdog) -> None:
    with forked(["sh", "-c", "echo ready; exec sleep 60"]) as process:
        server = watchdog.adopt(process.pid)
        process.terminate()
        assert server.wait(READY_S).how == "exited"
        with pytest.raises(harness.ServerExited, match="exit code unknown"):
            server.wait_ready(READY_S)


def test_closing_the_watchdog_stops_what_was_adopted(watchdog: harness.Watchdog) -> None:
    with forked(["sh", "-c", "echo ready; exec sleep 60"]) as process:
        server = watchdog.adopt(process.pid)
        watchdog.close()
        assert server.stop().how == "asked"
        assert process.wait(READY_S) == -15


def test_a_grandchild_can_be_adopted_and_its_parent_lives_on(watchdog: harness.Watchdog) -> None:
    with forked(family(member("root", member("child")))) as process:
        (child,) = processes.tree(process.pid)
        assert watchdog.adopt(child).stop().how == "asked"
        assert process.poll() is None


def test_only_an_own_living_process_can_be_adopted(watchdog: harness.Watchdog) -> None:
    launched = watchdog.launch(["sleep", "60"])
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", ""]) as ended:
        assert os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT) is not None
        wrong: list[tuple[object, str]] = [
            (0, "a pid is a number above 0"),
            (-1, "a pid is a number above 0"),
            (True, "a pid is a number above 0"),
            ("1", "a pid is a number above 0"),
            (1.5, "a pid is a number above 0"),
            (2**22 + 1, "there is no living process"),  # above the largest possible pid, proc(5) pid_max
            (ended.pid, "there is no living process"),
            (1, "was not started by this process"),
            (os.getppid(), "was not started by this process"),
            (os.getpid(), "was not started by this process"),
            (watchdog.pid, "was not started by this process"),
            (launched.pid, "was not started by this process"),
            (processes.parent(launched.pid), "was not started by this process"),
        ]
        for pid, reason in wrong:
            with pytest.raises(harness.SpecError, match=reason):
                watchdog.adopt(pid)  # type: ignore[arg-type]  # some are no numbers
    with pytest.raises(harness.SpecError, match="grace_s must be more than 0"):
        watchdog.adopt(1, grace_s=0)
    assert watchdog.servers == (launched,)
