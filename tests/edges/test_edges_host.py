"""The modules that read the host: processes, listeners, logs and the state directory."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from typing import TYPE_CHECKING

import processes
import pytest

import harness
from harness import listeners, logs, procfs, state_dir

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LONG_AGO = time.time() - 2 * 24 * 3600


# ---- procfs


def test_a_stat_is_read_whatever_the_program_is_called(tmp_path: Path) -> None:
    program = shutil.copy(shutil.which("sleep") or "", tmp_path / "a) Z (1 2")
    with subprocess.Popen([program, "60"]) as process, contextlib.ExitStack() as at_the_end:
        at_the_end.callback(process.kill)
        # The kernel shows a program's arguments a moment after execve has succeeded.
        wanted = f"{program} 60"
        processes.wait_for(lambda: procfs.command_line(process.pid) == wanted, 10.0, "its command line")
        found = procfs.stat(process.pid)
        assert found is not None
        assert (found.pid, found.parent) == (process.pid, os.getpid())
        assert (found.process_group, found.session) == (os.getpgid(0), os.getsid(0))
        assert found.state in "RSD"
        assert procfs.is_alive(process.pid, found.start_time)
        assert not procfs.is_alive(process.pid, found.start_time + 1)
        assert process.pid in procfs.children(os.getpid())
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        zombie = procfs.stat(process.pid)
        assert zombie is not None
        assert (zombie.state, procfs.command_line(process.pid)) == ("Z", "")
        assert not procfs.is_alive(process.pid, found.start_time)


def test_nothing_is_known_of_a_process_that_is_not_there() -> None:
    nobody = 2**22 + 1  # above the largest possible pid, proc(5) pid_max
    assert procfs.stat(nobody) is None
    assert procfs.children(nobody) == procfs.descendants(nobody) == []
    assert procfs.command_line(nobody) == procfs.wait_channel(nobody) == ""
    assert not procfs.is_alive(nobody, 1)


def test_descendants_come_after_their_parents() -> None:
    script = 'sh -c "sleep 60 & wait" & wait'
    with subprocess.Popen(["sh", "-c", script], start_new_session=True) as process:  # noqa: S607
        try:
            wanted = ["sh", "sleep"]
            processes.wait_for(lambda: names_below(process.pid) == wanted, 10.0, "the tree")
            found = procfs.descendants(process.pid)
            assert sorted(found) == sorted(processes.tree(process.pid))
            assert [processes.parent(pid) for pid in found] == [process.pid, found[0]]
        finally:
            everybody = processes.identities(processes.tree(process.pid))
            os.killpg(process.pid, signal.SIGKILL)
            processes.wait_gone(everybody, 10.0)


def names_below(pid: int) -> list[str]:
    return [processes.name(below) for below in procfs.descendants(pid)]


# ---- listeners


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        yield opened


def test_who_listens(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    assert listeners.inodes(port) == set()
    assert not listeners.are_all_of([os.getpid()], port)
    listener.listen()
    assert listeners.inodes(port) == {str(os.fstat(listener.fileno()).st_ino)}
    assert listeners.are_all_of([os.getpid()], port)
    assert listeners.are_all_of([2**22 + 1, os.getpid()], port)
    with subprocess.Popen([shutil.which("sleep") or "sleep", "60"]) as other:  # whose descriptors this user may read
        assert not listeners.are_all_of([other.pid], port)
        other.kill()
    assert not listeners.are_all_of([], port)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_a_listener_on_ipv6_is_seen() -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        assert listeners.are_all_of([os.getpid()], server.getsockname()[1])


def test_two_listeners_on_one_port_must_both_be_the_servers(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    listener.listen()
    other = "import socket, sys; s = socket.create_server(('127.0.0.2', int(sys.argv[1]))); print(flush=True); input(s)"
    with subprocess.Popen(
        ["python3", "-c", other, str(port)],  # noqa: S607
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(listeners.inodes(port)) == 2
        assert not listeners.are_all_of([os.getpid()], port)
        assert listeners.are_all_of([os.getpid(), process.pid], port)
        process.kill()


# ---- logs


def test_names_of_logs(tmp_path: Path) -> None:
    names = ["dp0", "../../etc/passwd", "a b\nc", "ü" * 200, "", "dp0"]
    paths = [logs.new_path(tmp_path / "new", name) for name in names]
    assert len(set(paths)) == len(paths)
    assert all(path.parent == tmp_path / "new" for path in paths)
    assert all(len(os.fsencode(path.name)) <= 255 for path in paths)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_a_log_of_another_process_is_not_gone_on_with(tmp_path: Path) -> None:
    """A directory of logs may be kept, and shared by containers: another process had, or has, the same pid."""
    before, number = logs.new_path(tmp_path, "a").stem.rsplit("-", 1)
    other = tmp_path / f"{before}-{int(number) + 1}.log"
    other.write_text("its output", encoding="utf-8")
    path = logs.new_path(tmp_path, "a")
    assert path != other
    assert path.read_text(encoding="utf-8") == ""


@pytest.mark.parametrize(
    ("content", "lines", "expected"),
    [
        (b"", 5, ""),
        (b"one", 5, "one"),
        (b"one\ntwo\n", 1, "two"),
        (b"one\ntwo\n", 0, ""),
        (b"one\ntwo\n", -1, ""),
        (b"\xff\0\n", 1, "\N{REPLACEMENT CHARACTER}\0"),
        (b"x" * 200_000, 5, "x" * 2000),
        (b"lost" + b"x" * 70_000 + b"\nlast", 50, "last"),
    ],
)
def test_tails_of_logs(tmp_path: Path, content: bytes, lines: int, expected: str) -> None:
    (tmp_path / "log").write_bytes(content)
    assert logs.tail(tmp_path / "log", lines) == expected
    assert logs.tail(tmp_path / "missing", lines) == ""


# ---- state_dir


def test_a_state_directory_is_made_closed_and_an_open_one_is_refused(tmp_path: Path) -> None:
    made = state_dir.find(tmp_path / "a" / "state")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    for mode in (0o777, 0o710, 0o701):
        made.chmod(mode)
        with pytest.raises(harness.HarnessError, match=rf"has mode {mode:04o}, so others can get in"):
            state_dir.find(made)
        assert stat.S_IMODE(made.stat().st_mode) == mode, "it may be one that others need, such as /tmp"


def test_a_missing_state_directory_is_not_made_to_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(harness.HarnessError, match=r"cannot look at the state directory .*: No such file"):
        state_dir.find(tmp_path / "missing", make=False)
    assert not (tmp_path / "missing").exists()


def test_where_the_state_directory_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HARNESS_STATE_DIR", "relative")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    assert state_dir.find() == tmp_path / "relative"
    monkeypatch.delenv("HARNESS_STATE_DIR")
    assert state_dir.find() == tmp_path / "run" / "harness"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert str(state_dir.default()) == f"/tmp/harness-{os.geteuid()}"  # noqa: S108 - its owner and mode are checked
    monkeypatch.setenv("HARNESS_STATE_DIR", "relative")
    with harness.Watchdog() as watchdog:
        server = watchdog.launch(["sleep", "60"])
        assert tmp_path / "relative" in server.log_path.parents


def test_a_planted_state_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").touch()
    for name in ("link", "dangling", "file", "file/below"):
        with pytest.raises(
            harness.HarnessError, match=r"the state directory .*(is a link or a file|: File exists|: Not a)"
        ):
            harness.Watchdog(state_dir=tmp_path / name).start()
    assert list((tmp_path / "real").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to somebody else")
def test_another_users_state_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o777)
    os.chown(tmp_path / "state", 12345, -1)
    with pytest.raises(harness.HarnessError, match="belongs to user 12345"):
        state_dir.find(tmp_path / "state")
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) != 0o700


def test_old_runs_are_removed_when_nobody_of_them_is_left(tmp_path: Path) -> None:
    me = processes.identify(os.getpid())
    assert me is not None
    own = tmp_path / "runs" / f"{me.pid}-{me.start_time}"
    runs = {
        own: LONG_AGO,
        tmp_path / "runs" / f"{me.pid}-{me.start_time + 1}": LONG_AGO,  # the pid is in use again
        tmp_path / "runs" / f"{2**22 + 1}-1": LONG_AGO,
        tmp_path / "runs" / f"{2**22 + 2}-1": time.time(),
        tmp_path / "runs" / "not-of-ours": LONG_AGO,
    }
    state_dir.prune(tmp_path)  # there is nothing yet
    for run, changed in runs.items():
        run.mkdir(parents=True)
        (run / "server.log").touch()
        for path in (run / "server.log", run):
            os.utime(path, (changed, changed))
    log = tmp_path / "runs" / f"{2**22 + 3}-1" / "server.log"  # of a long run, which has ended just now
    log.parent.mkdir()
    log.touch()
    os.utime(log.parent, (LONG_AGO, LONG_AGO))
    state_dir.prune(tmp_path)
    left = [run for run in runs if run.exists()]
    assert left == [run for at, run in enumerate(runs) if at not in {1, 2}]
    assert log.exists()


def test_two_processes_prune_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / f"{2**22 + 1}-1"
    run.mkdir(parents=True)

    def is_alive(_pid: int, _start_time: int) -> bool:
        shutil.rmtree(run)  # what the other process does at this moment
        return False

    monkeypatch.setattr(procfs, "is_alive", is_alive)
    state_dir.prune(tmp_path)
