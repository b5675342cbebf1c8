"""`python -m harness ps` and `stop`, on real watchdogs: also where nobody answers.

The sleeps are servers and tests that do nothing but be there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import processes
import pytest
from processes import wait_for

import harness
from harness import command_line, live, live_command, procfs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SERVERS = Path(__file__).parents[1] / "servers"
READY_S = 30.0
EVERY = live.watchdogs
SLEEP = ["sleep", "600"]
HUNG_TEST = """
import time

def test_hangs(watchdog):
    watchdog.launch(["sleep", "600"], name="held")
    open("launched", "w").close()
    time.sleep(600)
"""


def of(watchdog: harness.Watchdog) -> live.LiveWatchdog:
    (found,) = [each for each in live.watchdogs() if each.pid == watchdog.pid]
    return found


def state_of(pid: int) -> str:
    found = procfs.stat(pid)
    return "" if found is None else found.state


@pytest.fixture
def only_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[harness.Watchdog]:
    """Give a watchdog that may be ended, and let the command see no other: `stop --all` must not end its neighbours."""
    owner = harness.Watchdog(state_dir=tmp_path / "state").start()
    owner.launch(["true"]).wait(READY_S)  # one that is still starting has no name yet, by which it is found
    monkeypatch.setattr(live, "watchdogs", lambda: [each for each in EVERY() if each.pid == owner.pid])
    yield owner
    with contextlib.suppress(harness.WatchdogDied):
        owner.close()


@pytest.fixture
def impostor() -> Iterator[subprocess.Popen[bytes]]:
    """Give a process that has a watchdog's name, and nothing else of it."""
    code = "import time; open('/proc/self/comm', 'w').write('harness-watchd'); print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_every_server_is_shown_with_its_tree_and_its_ports(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    web = [sys.executable, "-I", "-S", str(SERVERS / "web.py"), "{port}", "200"]
    first = watchdog.launch(web, name="web", ready=harness.port_open()).wait_ready(timeout_s=READY_S)
    second = watchdog.launch(["sh", "-c", "sleep 600 & sleep 600"], name="two sleepers")
    wait_for(lambda: len(second.pids()) == 3, READY_S, "the shell has two children")
    found = of(watchdog)
    assert (found.test_process, found.is_stopped, found.test) == (os.getpid(), False, "")
    assert Path(found.run).parent == tmp_path / "state" / "runs"
    shown = {server.name: server for server in found.servers}
    assert shown["web"].pid == first.pid
    assert shown["web"].ports == [first.port]
    assert (shown["web"].processes, shown["two sleepers"].processes) == (1, 3)
    assert shown["two sleepers"].ports == []
    assert shown["web"].memory_mib > 1
    assert shown["web"].log == str(first.log_path)
    assert 0 <= shown["web"].age_s <= found.age_s + 0.1
    first.stop()
    assert [server.name for server in of(watchdog).servers] == ["two sleepers"]


def test_the_table_shows_what_a_person_needs(only_ours: harness.Watchdog, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["ps"]) == 0
    assert f"of process {os.getpid()}\n  no server\n" in capsys.readouterr().out
    server = only_ours.launch(SLEEP, name="a\N{ESCAPE}[2Jb")
    assert command_line.main(["ps"]) == 0
    head, columns, row = capsys.readouterr().out.splitlines()
    assert head.startswith(f"watchdog {only_ours.pid}, ")
    assert columns.split() == ["PID", "AGE", "PROCESSES", "MEMORY", "PORTS", "SERVER"]
    assert row.split()[0] == str(server.pid)
    assert row.endswith("-                     a?[2Jb")
    os.kill(only_ours.pid or 0, signal.SIGSTOP)
    wait_for(lambda: state_of(only_ours.pid or 0) == "T", READY_S, "it is stopped")
    assert command_line.main(["ps"]) == 0
    assert ", stopped by a signal, of process" in capsys.readouterr().out
    os.kill(only_ours.pid or 0, signal.SIGCONT)


def test_a_keeper_that_is_leaving_is_no_server_and_one_that_was_killed_has_its_own(watchdog: harness.Watchdog) -> None:
    with subprocess.Popen(SLEEP) as bare:
        stat = procfs.stat(bare.pid)
        bare.kill()
    assert stat is not None
    assert live._server(stat, []) is None
    server = watchdog.launch(SLEEP, name="one")
    keeper = processes.parent(server.pid)
    os.kill(watchdog.pid or 0, signal.SIGSTOP)  # so that it cannot end what it has lost
    wait_for(lambda: state_of(watchdog.pid or 0) == "T", READY_S, "it is stopped")
    os.kill(keeper, signal.SIGKILL)
    wait_for(lambda: state_of(keeper) == "Z", READY_S, "its keeper has died")
    assert [each.name for each in of(watchdog).servers] == ["one"]
    os.kill(watchdog.pid or 0, signal.SIGCONT)


def test_json_is_for_programs(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(SLEEP, name="one")
    command = [sys.executable, "-m", "harness", "ps", "--json"]
    shown = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    (found,) = [each for each in shown if each["pid"] == watchdog.pid]
    assert [(each["name"], each["pid"]) for each in found["servers"]] == [("one", server.pid)]


def test_a_name_that_the_encoding_does_not_hold_is_shown(watchdog: harness.Watchdog) -> None:
    watchdog.launch(SLEEP, name="caf\N{LATIN SMALL LETTER E WITH ACUTE}")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "harness", "ps"]
    shown = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60).stdout
    assert b"  caf\\xe9\n" in shown


def test_a_server_whose_entry_cannot_be_read_is_shown_without_its_name(watchdog: harness.Watchdog) -> None:
    watchdog.launch(SLEEP, name="one")
    (entry,) = Path(of(watchdog).run).glob("server-*.json")
    text = entry.read_bytes()
    entry.write_bytes(b"{}")
    (server,) = of(watchdog).servers
    assert (server.name, server.pid, server.processes) == ("", None, 1)
    assert live_command.table([of(watchdog)])[-1].endswith("?")
    entry.write_bytes(text)


def test_a_watchdog_of_another_user_is_neither_shown_nor_stopped(
    watchdog: harness.Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert watchdog.pid not in [each.pid for each in live.watchdogs()]
    with pytest.raises(harness.SpecError, match="is no watchdog of this user"):
        live.hold(watchdog.pid or 0)


def test_a_zombie_in_a_tree_hides_no_port(watchdog: harness.Watchdog) -> None:
    program = str(SERVERS / "web.py")
    code = f"import os, runpy; os.fork() or os._exit(0); runpy.run_path({program!r}, run_name='__main__')"
    command = [sys.executable, "-I", "-S", "-c", code, "{port}", "200"]
    server = watchdog.launch(command, ready=harness.port_open()).wait_ready(timeout_s=READY_S)
    wait_for(lambda: [state_of(pid) for pid in server.pids()][1:] == ["Z"], READY_S, "the child has ended")
    (shown,) = of(watchdog).servers
    assert (shown.processes, shown.ports) == (2, [server.port])


def test_servers_that_are_being_launched_are_no_watchdogs(watchdog: harness.Watchdog) -> None:
    pids = set()
    with ThreadPoolExecutor(1) as launching:
        done = launching.submit(lambda: [watchdog.launch(SLEEP) for _ in range(30)])
        while not done.done():
            pids |= {each.pid for each in live.watchdogs()}
    servers = {pid for server in watchdog.servers for pid in (server.pid, processes.parent(server.pid))}
    assert not pids & servers


# ---- stop


@pytest.mark.parametrize("how", ["named", "all"])
def test_stop_ends_the_servers_and_the_watchdog_also_a_stopped_one(
    only_ours: harness.Watchdog, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    servers = [only_ours.launch(SLEEP) for _ in range(3)]
    pid = only_ours.pid or 0
    if how == "all":
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: state_of(pid) == "T", READY_S, "it is stopped")
    assert command_line.main(["stop", "--all"] if how == "all" else ["stop", str(pid), str(pid)]) == 0
    assert capsys.readouterr().out == f"watchdog {pid}, 3 servers: ended\n"
    assert not [server for server in servers if processes.identify(server.pid) is not None]
    assert command_line.main(["ps"]) == 0
    assert command_line.main(["stop", "--all"]) == 0
    assert capsys.readouterr().out == "no watchdog is running\nno watchdog is running\n"
    with pytest.raises(harness.WatchdogDied):
        only_ours.launch(SLEEP)


def test_a_stop_that_takes_longer_is_told_and_goes_on(
    only_ours: harness.Watchdog, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    command = [sys.executable, "-I", "-S", "-c", code]
    server = only_ours.launch(command, ready=harness.log_line("ready"), grace_s=6.0).wait_ready(timeout_s=READY_S)
    assert command_line.main(["stop", str(only_ours.pid), "--timeout", "0.1", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert row == {"watchdog": only_ours.pid, "servers": 1, "outcome": "still stopping", "keepers": []}
    processes.wait_gone([server.pid, only_ours.pid or 0], READY_S)


def test_a_watchdog_that_ends_meanwhile_does_not_keep_all_from_being_stopped(
    only_ours: harness.Watchdog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with harness.Watchdog(state_dir=tmp_path / "state") as other:
        other.launch(["true"]).wait(READY_S)
        (gone,) = [each for each in EVERY() if each.pid == other.pid]
    ours = of(only_ours)
    monkeypatch.setattr(live, "watchdogs", lambda: [gone, ours])
    assert command_line.main(["stop", "--all", "--timeout", "4000000"]) == 0
    assert not only_ours.is_alive


def test_what_is_no_watchdog_is_refused_before_anything_is_told(
    watchdog: harness.Watchdog, impostor: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    server = watchdog.launch(SLEEP)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    for pid in (str(os.getpid()), str(server.pid), str(impostor.pid), gone.stdout.decode().strip()):
        assert command_line.main(["stop", str(watchdog.pid), pid]) == 2
        assert f"{pid} is no watchdog of this user" in capsys.readouterr().err
    assert server.is_alive
    assert impostor.poll() is None


@pytest.mark.parametrize(
    "wrong", [[], ["7", "--all"], ["x"], ["1"], ["-5"], ["7", "--timeout", "soon"], ["7", "--timeout", "-1"]], ids=str
)
def test_wrong_usage_of_stop_is_2(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command_line.main(["stop", *wrong])
    assert ended.value.code == 2
    assert "usage: python -m harness stop" in capsys.readouterr().err


def test_a_hung_run_is_shown_with_its_test_and_its_servers_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_hung: Callable[[], subprocess.Popen[bytes]]
) -> None:
    monkeypatch.setenv("HARNESS_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "test_it.py").write_text(HUNG_TEST, encoding="ascii")
    run = run_hung()
    wait_for((tmp_path / "launched").exists, READY_S, "the test has launched its server")
    (found,) = [each for each in live.watchdogs() if each.test_process == run.pid]
    assert found.test == "test_it.py::test_hangs"
    (server,) = found.servers
    os.kill(run.pid, signal.SIGSTOP)
    assert command_line.main(["stop", str(found.pid)]) == 0
    assert server.pid is not None
    processes.wait_gone([server.pid], 0.1)
    assert state_of(run.pid) == "T"


@pytest.fixture
def run_hung(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Give a function that starts pytest in a directory, and kill it at the end."""
    runs = []

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
        runs.append(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()
        run.wait()
