"""What the client of a watchdog sees when that has been killed, stopped, or could not start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from faults.runs import TREE_SERVER, Watched
from processes import wait_for

import harness
from harness import forking, link, procfs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def watchdog(tmp_path: Path) -> Iterator[harness.Watchdog]:
    owner = harness.Watchdog(state_dir=tmp_path / "state", crash_grace_s=0.5).start()
    yield owner
    try:
        owner.close()
    except harness.WatchdogDied:
        assert not owner.is_alive


def launch(watchdog: harness.Watchdog, marks: Path, *options: str) -> harness.Server:
    command = [sys.executable, "-I", "-S", str(TREE_SERVER), str(marks), *options]
    return watchdog.launch(command, ready=harness.log_line("ready"), grace_s=0.5).wait_ready(timeout_s=30)


def test_close_returns_when_the_keepers_of_a_dead_watchdog_are_done(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    server = launch(watchdog, tmp_path, "--ignore")
    pids = server.pids()
    with Watched(pids) as watched:
        os.kill(watchdog.pid or 0, signal.SIGKILL)
        with pytest.raises(harness.WatchdogDied, match="killed by SIGKILL"):
            watchdog.close()
        assert watched.alive() == []
    assert not watchdog.is_alive


def test_a_keeper_that_is_stopped_after_its_watchdog_has_died_is_continued_by_close(
    watchdog: harness.Watchdog, tmp_path: Path
) -> None:
    server = launch(watchdog, tmp_path, "--ignore")
    found = procfs.stat(server.pid)
    assert found is not None
    with Watched([*server.pids(), found.parent]) as watched, Watched([watchdog.pid or 0]) as dead:
        os.kill(watchdog.pid or 0, signal.SIGKILL)
        assert dead.wait_gone(20.0) == []
        os.kill(found.parent, signal.SIGSTOP)
        with pytest.raises(harness.WatchdogDied):
            watchdog.close()
        assert watched.alive() == []


def test_everything_fails_clearly_once_the_watchdog_has_died(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    server = launch(watchdog, tmp_path)
    with Watched(server.pids()) as watched:
        os.kill(watchdog.pid or 0, signal.SIGKILL)
        for attempt in (server.stop, server.wait, lambda: server.state, lambda: launch(watchdog, tmp_path)):
            with pytest.raises(harness.WatchdogDied, match="has died"):
                attempt()
        assert watched.wait_gone(10.0) == []


def test_a_stopped_watchdog_is_ended_by_close(
    watchdog: harness.Watchdog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = launch(watchdog, tmp_path)
    monkeypatch.setattr(link, "ANSWER_S", 0.2)
    monkeypatch.setattr(link, "END_S", 0.2)
    with Watched([*server.pids(), watchdog.pid or 0]) as watched:
        os.kill(watchdog.pid or 0, signal.SIGSTOP)
        with pytest.raises(harness.WatchdogDied, match="has not answered"):
            watchdog.close()
        assert watched.wait_gone(10.0) == []


def test_a_stopped_keeper_is_ended_and_its_tree_swept(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    server = launch(watchdog, tmp_path, "--ignore")
    found = procfs.stat(server.pid)
    assert found is not None
    with Watched([*server.pids(), found.parent]) as watched:
        os.kill(found.parent, signal.SIGSTOP)
        outcome = server.stop()
        assert watched.alive() == []
    assert outcome.how == "killed"


def test_an_interpreter_that_cannot_be_executed_is_named(
    watchdog: harness.Watchdog, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-such-python"))
    with harness.Watchdog(state_dir=tmp_path / "other") as broken:
        with pytest.raises(harness.WatchdogDied, match=r"cannot execute .*no-such-python.*No such file"):
            broken.launch(["true"])
        with pytest.raises(harness.WatchdogDied):
            broken.close()
    assert watchdog.is_alive


def test_a_stopped_watchdog_sees_its_test_process_die(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys
import harness
watchdog = harness.Watchdog(state_dir={str(tmp_path / "state")!r}, crash_grace_s=0.5).start()
server = watchdog.launch([sys.executable, "-I", "-S", {str(TREE_SERVER)!r}, {str(tmp_path)!r}, "--ignore"],
                         ready=harness.log_line("ready")).wait_ready(timeout_s=30)
print(*[watchdog.pid, *server.pids()], flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        pids = [int(pid) for pid in client.stdout.readline().split()]
        with Watched(pids) as watched:
            os.kill(pids[0], signal.SIGSTOP)
            client.kill()
            assert watched.wait_gone(10.0) == []


def test_a_stopped_keeper_sees_its_watchdog_die(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    server = launch(watchdog, tmp_path, "--ignore")
    found = procfs.stat(server.pid)
    assert found is not None
    with Watched([*server.pids(), found.parent]) as watched:
        os.kill(found.parent, signal.SIGSTOP)
        os.kill(watchdog.pid or 0, signal.SIGKILL)
        assert watched.wait_gone(10.0) == []


def test_a_second_interrupt_ends_the_wait_for_a_stopped_watchdog(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    server = launch(watchdog, tmp_path)
    interrupts = 0

    def interrupt(_signal: int, _frame: object) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts < 2:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Watched([*server.pids(), watchdog.pid or 0]) as watched:
            os.kill(watchdog.pid or 0, signal.SIGSTOP)
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                watchdog.close()
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert watched.wait_gone(10.0) == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interrupts == 2
    assert not watchdog.is_alive


def test_close_from_a_signal_handler_while_it_closes(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    server = launch(watchdog, tmp_path, "--ignore")
    previous = signal.signal(signal.SIGALRM, lambda _signal, _frame: watchdog.close())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        watchdog.close()
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert not server.is_alive


def test_a_server_of_a_dead_watchdog_is_known_to_be_gone(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    server = launch(watchdog, tmp_path)
    os.kill(watchdog.pid or 0, signal.SIGKILL)
    with pytest.raises(harness.WatchdogDied):
        watchdog.close()
    assert not server.is_alive
    assert server.pids() == []


def test_an_environment_that_fills_the_pipe(watchdog: harness.Watchdog) -> None:
    """It takes some 40 frames, more than the Pipe holds: none of them may be cut in two."""
    text = "x" * 100_000
    for _ in range(3):
        server = watchdog.launch(["sleep", "100"], env={f"V{number}": text for number in range(14)})
        assert server.is_alive
        server.kill()


_STOPPED_EARLY = """
import os, signal, sys
from pathlib import Path
from harness import forking
real = forking._close_all_but
def stop_first(kept):
    os.kill(os.getpid(), signal.SIGSTOP)
    real(kept)
forking._close_all_but = stop_first
print(forking.WatchdogProcess(Path(sys.argv[1]), crash_grace_s=1.0).pid, flush=True)
signal.pause()
"""


def test_a_watchdog_that_is_stopped_with_its_first_instruction_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing would wake it after the test process's end, so the test process does not go on before it can be woken."""
    pids = tmp_path / "pid"

    def stop(_pipe: int) -> None:
        with pids.open("a", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
        os.kill(os.getpid(), signal.SIGSTOP)

    monkeypatch.setattr(forking, "_wake_at_end_of", stop)
    monkeypatch.setattr(
        forking, "_UP_LIMIT_S", 8.0
    )  # in which a child on a busy machine comes to its first instruction
    with pytest.raises(harness.HarnessError, match="the child was stopped"):
        forking.WatchdogProcess(tmp_path / "log", crash_grace_s=1.0)
    stopped = pids.read_text(encoding="ascii").split()
    assert len(stopped) == 2
    assert [procfs.stat(int(pid)) for pid in stopped] == [None, None]


def test_a_child_that_hangs_before_its_first_instruction_is_forked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a lock that another thread held at the fork: what runs first in every child may take it."""
    hung = tmp_path / "pid"
    real = forking._wake_at_end_of
    monkeypatch.setattr(forking, "_UP_LIMIT_S", 8.0)  # as above

    def hang_once(pipe: int) -> None:
        if not hung.exists():
            hung.write_text(str(os.getpid()), encoding="ascii")
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()
        real(pipe)

    monkeypatch.setattr(forking, "_wake_at_end_of", hang_once)
    process = forking.WatchdogProcess(tmp_path / "log", crash_grace_s=1.0)
    assert procfs.stat(process.pid) is not None
    assert process.pid != int(hung.read_text(encoding="ascii"))
    assert procfs.stat(int(hung.read_text(encoding="ascii"))) is None
    process.close()


def is_stopped(pid: int) -> bool:
    found = procfs.stat(pid)
    return found is not None and found.state == "T"


def test_a_watchdog_that_is_stopped_before_it_executes_its_program_ends_with_its_test_process(tmp_path: Path) -> None:
    """PR_SET_PDEATHSIG is not set yet: the end of the Pipe wakes it."""
    command = [sys.executable, "-c", _STOPPED_EARLY, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        watchdog = int(client.stdout.readline())
        with Watched([watchdog]) as watched:
            wait_for(lambda: is_stopped(watchdog), 10.0, "it is stopped")
            client.kill()
            assert watched.wait_gone(10.0) == []
