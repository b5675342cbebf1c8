"""What SIGKILL does not end is reported in bounded time, disturbs no other server, and is watched until it has gone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from faults.held import Frozen, Holder, Traced
from faults.runs import GATE, POLITE, STUBBORN, TREE_SERVER, Watched
from faults.test_storms import Storm
from processes import wait_for

import harness
from harness import procfs
from harness.watchdog.keeper_rules import KILL_LIMIT_S
from harness.watchdog.sweep import MOST_NAMED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from faults.conftest import StartRun

TIMEOUT_S = 30.0
GRACE_S = 0.3
# A stop may take so long beside its grace and the time that SIGKILL gets; machines are busy.
SLACK_S = 4.5  # less than KILL_LIMIT_S: a second one would show


@pytest.fixture(params=[Frozen, Traced], ids=["frozen", "traced"])
def holder(request: pytest.FixtureRequest) -> Iterator[Holder]:
    made: Holder = request.param()
    yield made
    made.release()


def launch(
    owner: harness.Watchdog | harness.ServerGroup, marks: Path, *options: str, grace_s: float = GRACE_S
) -> harness.Server:
    command = [sys.executable, "-I", "-S", str(TREE_SERVER), str(marks), *options]
    server = owner.launch(command, ready=harness.log_line("ready"), grace_s=grace_s)
    return server.wait_ready(timeout_s=TIMEOUT_S)


def keeper_of(server: harness.Server) -> int:
    found = procfs.stat(server.pid)
    assert found is not None
    return found.parent


def test_it_is_reported_and_its_end_is_seen(guarded: harness.Watchdog, holder: Holder, tmp_path: Path) -> None:
    with pytest.raises(harness.Leaked) as caught, guarded.group() as group:  # noqa: PT012 - it is the leaving that raises
        stuck = launch(group, tmp_path)
        others = [launch(group, tmp_path, grace_s=4.0), launch(group, tmp_path, "--ignore")]
        (held,) = [pid for pid in stuck.pids() if procfs.stat(pid).parent == stuck.pid]  # type: ignore[union-attr]
        holder.hold([held])
        began = time.monotonic()
    took_s = time.monotonic() - began
    assert KILL_LIMIT_S <= took_s < GRACE_S + KILL_LIMIT_S + SLACK_S
    report = group.stop()  # it says the same, at once
    assert time.monotonic() - began < took_s + 4.0
    assert not report.is_clean
    (survivor,) = report.survivors
    assert (survivor.pid, survivor.state in "Dt", str(TREE_SERVER) in survivor.command) == (held, True, True)
    assert survivor.wait_channel or os.geteuid() != 0  # the kernel tells it to root alone
    assert f"{stuck.name!r} (pid {stuck.pid}): unkillable" in str(caught.value)
    assert f"pid {held} in state {survivor.state}" in str(caught.value)
    assert [outcome.how for outcome in report.outcomes] == ["unkillable", "asked", "killed"]
    assert all(server.outcome and server.outcome.seconds < KILL_LIMIT_S for server in others)
    assert (stuck.state, stuck.is_alive) == ("unkillable", True)

    holder.release()
    wait_for(lambda: not stuck.is_alive, TIMEOUT_S, "its end is seen")
    assert stuck.stop().how == "killed"
    assert stuck.stop().survivors == ()
    assert group.stop().is_clean


def test_close_returns_and_its_keeper_stays_until_it_has_gone(
    guarded: harness.Watchdog, holder: Holder, tmp_path: Path
) -> None:
    server = launch(guarded, tmp_path)
    keeper = keeper_of(server)
    holder.hold([server.pid])
    with Watched([keeper, server.pid]) as watched:
        began = time.monotonic()
        report = guarded.close()
        assert time.monotonic() - began < GRACE_S + KILL_LIMIT_S + SLACK_S
        assert [(outcome.how, outcome.survivors[0].pid) for outcome in report.outcomes] == [("unkillable", server.pid)]
        assert not guarded.is_alive
        assert watched.alive() == [keeper, server.pid]
        assert server.is_alive
        holder.release()
        assert watched.wait_gone(3.0) == []
    assert not server.is_alive


def test_close_returns_after_the_watchdogs_death(guarded: harness.Watchdog, holder: Holder, tmp_path: Path) -> None:
    server = launch(guarded, tmp_path)
    keeper = keeper_of(server)
    holder.hold([server.pid])
    with Watched([keeper, server.pid]) as watched:
        os.kill(guarded.pid or 0, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(harness.WatchdogDied):
            guarded.close()
        assert time.monotonic() - began < 12.0
        assert watched.alive() == [keeper, server.pid]
        holder.release()
        assert watched.wait_gone(3.0) == []


def test_what_a_lost_keeper_left_is_reported_too(guarded: harness.Watchdog, holder: Holder, tmp_path: Path) -> None:
    server = launch(guarded, tmp_path)
    holder.hold([server.pid])
    os.kill(keeper_of(server), signal.SIGKILL)
    began = time.monotonic()
    outcome = server.stop()
    assert time.monotonic() - began < GRACE_S + KILL_LIMIT_S + SLACK_S
    assert (outcome.how, [survivor.pid for survivor in outcome.survivors]) == ("unkillable", [server.pid])
    other = launch(guarded, tmp_path, "--ignore")
    assert other.stop().how == "killed"
    holder.release()
    wait_for(lambda: not server.is_alive, TIMEOUT_S, "its end is seen")
    assert server.stop().how == "killed"


def test_pytest_ends_and_names_it(start_run: StartRun, holder: Holder) -> None:
    run = start_run(ending=GATE + "pass", servers=[POLITE, STUBBORN], grace_s=GRACE_S)
    (up,) = run.ups()
    held = up.trees[1][0]
    holder.hold([held])
    everything = [up.watchdog, *up.keepers, *up.server_pids]
    with Watched(everything) as watched:
        run.go()
        assert run.end(GRACE_S + KILL_LIMIT_S + 3 * SLACK_S) == 1
        assert "Leaked: processes survived SIGKILL" in run.text()
        assert f"pid {held} in state" in run.text()
        assert set(watched.wait_gone(4.0)) == {held, up.keepers[1]}
        holder.release()
        assert watched.wait_gone(3.0) == []


def test_so_many_that_no_report_can_name_all(guarded: harness.Watchdog, tmp_path: Path) -> None:
    holder, storm = Frozen(), Storm(tmp_path)
    try:
        server = storm.launch(guarded, "bomb", 300, "x" * 300)  # with command lines that are long
        pids = server.pids()
        holder.hold(pids)
        outcome = server.stop()
        assert (outcome.how, storm.is_over(0.0)) == ("unkillable", False)
        assert outcome.seconds < GRACE_S + KILL_LIMIT_S + SLACK_S
        assert len(outcome.survivors) == MOST_NAMED
        assert {survivor.pid for survivor in outcome.survivors} <= set(pids)
        holder.release()
        assert storm.is_over(5.0)
        wait_for(lambda: not server.is_alive, TIMEOUT_S, "its end is seen")
        assert server.stop().how == "killed"
    finally:
        holder.release()
        storm.close()


# A set-user-ID program can be signalled by its real user, until it makes itself wholly the other one, as sudo does.
_SERVER = "import os, time; {change}; print('ready', flush=True); time.sleep(1000)"
_SCRIPT = """
import os, sys
directory, program, server = sys.argv[1:]
os.setgroups([]); os.setgid(65534); os.setuid(65534)
import harness
watchdog = harness.Watchdog(state_dir=directory + "/state").start()
server = watchdog.launch([program, "-I", "-S", "-c", server], ready=harness.log_line("ready"), grace_s=4.0)
print(server.wait_ready(timeout_s=30).pid, flush=True)
def stop():
    report = watchdog.stop([server])
    print([(o.how, o.seconds < 13.5, [s.pid for s in o.survivors]) for o in report.outcomes], flush=True)
    print(report, open(os.path.dirname(server.log_path) + "/watchdog.log").read(), file=sys.stderr)
sys.stdin.readline()
stop()
sys.stdin.read()
server.wait_until("exit", 20.0)
while server.is_alive: pass
stop()
print(watchdog.close().is_clean, flush=True)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a set-user-ID program of another user")
@pytest.mark.parametrize("change", ["pass", "os.setresuid(0, 0, 0)"])
def test_a_set_user_id_program(change: str) -> None:
    python = shutil.which("python3", path="/usr/bin")
    if python is None:
        pytest.skip("there is no Python that another user may execute")
    with tempfile.TemporaryDirectory(prefix="harness-test-") as directory:  # tmp_path is closed to other users
        Path(directory).chmod(0o755)
        Path(directory, "state").mkdir(mode=0o700)
        os.chown(Path(directory, "state"), 65534, 65534)
        program = Path(shutil.copy(python, directory))
        program.chmod(0o4755)
        shutil.copytree(Path(harness.__file__).parent, Path(directory, "harness"))
        with subprocess.Popen(
            [python, "-c", _SCRIPT, directory, str(program), _SERVER.format(change=change)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=directory,
            env={"PATH": os.defpath, "PYTHONPATH": directory},
        ) as client:
            assert client.stdout is not None
            assert client.stdin is not None
            pid = int(client.stdout.readline())
            with Watched([pid]) as watched:
                client.stdin.write("stop\n")
                client.stdin.flush()
                if change == "pass":
                    assert client.stdout.readline() == "[('asked', True, [])]\n"
                else:
                    assert client.stdout.readline() == f"[('unkillable', True, [{pid}])]\n"
                    assert watched.alive() == [pid]
                    os.kill(pid, signal.SIGKILL)
                client.stdin.close()
                again = "asked" if change == "pass" else "killed"
                assert client.stdout.read() == f"[({again!r}, True, [])]\nTrue\n"
                assert client.wait(TIMEOUT_S) == 0
                assert watched.alive() == []
