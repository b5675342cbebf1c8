"""Parts of the watchdog process, run here in the test process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from harness import frames, listeners, procfs
from harness.watchdog import events, sweep
from harness.watchdog.log import Log
from harness.watchdog.orphans import Orphans
from harness.watchdog.pipe import PipeEnd
from harness.watchdog.ports import PortHolds

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SLEEP = [shutil.which("sleep") or "sleep", "60"]


@pytest.mark.parametrize("address", [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")], ids=["v4", "v6"])
def test_both_ways_to_find_listeners_agree(
    monkeypatch: pytest.MonkeyPatch, address: tuple[socket.AddressFamily, str]
) -> None:
    family, host = address
    with socket.socket(family) as listening:
        listening.bind((host, 0))
        port = listening.getsockname()[1]
        assert listeners.inodes(port) == set()
        listening.listen()
        found = listeners.inodes(port)
        assert found == {str(os.fstat(listening.fileno()).st_ino)}
        monkeypatch.setattr(listeners, "_NETLINK_SOCK_DIAG", 31)  # a protocol that the kernel does not have
        assert listeners.inodes(port) == found


def test_an_error_of_the_kernel_is_no_listener() -> None:
    refused = listeners._HEADER.pack(listeners._HEADER.size, listeners._NLMSG_ERROR, 0, 1, 0)
    with pytest.raises(OSError, match="does not answer"):
        listeners._read_part(refused, 80, [])


def test_the_log_says_where_a_mistake_arose_but_not_its_text(tmp_path: Path) -> None:
    path = tmp_path / "new" / "watchdog.log"
    log = Log(str(path))
    try:
        raise ValueError("sekrit")  # noqa: TRY301 - that is what is logged
    except ValueError as error:
        log.mistake(error)
    again = log.reopened()
    again.write("more")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert "unexpected ValueError at test_edges_watchdog_parts.py:" in lines[0]
    assert lines[1].endswith(f"[{os.getpid()}] more")
    assert "sekrit" not in lines[0]
    for opened in (log, again):
        os.close(opened._descriptor or 0)


def test_a_log_that_cannot_be_written_disturbs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    Log(str(tmp_path / "file" / "watchdog.log")).write("lost")


def test_the_pipe_takes_frames_in_pieces_and_waits_for_a_slow_reader() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pipe = PipeEnd(ours.fileno())
        assert pipe.receive() == []
        (frame,) = frames.split(7, b"hello")
        theirs.send(frame[:5])
        assert pipe.receive() == []
        theirs.send(frame[5:])
        assert pipe.receive() == [(7, b"hello")]
        reply = b"x" * 3_000_000
        pipe.send(8, reply)
        assert pipe.unsent_bytes > 0
        assembler, read, whole = frames.Assembler(), b"", None
        while whole is None:
            chunks, used = frames.parse(read := read + theirs.recv(1 << 16))
            read = read[used:]
            for chunk in chunks:
                whole = assembler.add(chunk)
            pipe.flush()
        assert whole == reply
        theirs.close()
        pipe.send(9, b"nobody")
        assert pipe.unsent_bytes == 0
        with pytest.raises(EOFError):
            pipe.receive()


def test_ports_are_given_back_when_not_all_can_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    hold = PortHolds._hold
    held: list[int] = []

    def fail_at_the_second(holds: PortHolds, wanted: int, host: str) -> int:
        if held:
            raise OSError("no more")
        held.append(hold(holds, wanted, host))
        return held[0]

    monkeypatch.setattr(PortHolds, "_hold", fail_at_the_second)
    with pytest.raises(OSError, match="no more"):
        PortHolds(["", "second"])
    assert held
    assert len(os.listdir("/proc/self/fd")) == before


ADDRESSES = ["127.0.0.1", "0.0.0.0", "::1", "::"]  # noqa: S104 - where servers listen


def listening(port: int, address: str, option: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, option, 1)
        listener.bind((address, port))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


@pytest.mark.parametrize("option", [socket.SO_REUSEADDR, socket.SO_REUSEPORT], ids=["SO_REUSEADDR", "SO_REUSEPORT"])
@pytest.mark.parametrize("address", ADDRESSES)
def test_a_server_can_use_the_port_that_is_held_for_it(address: str, option: int) -> None:
    if not has_address(address):
        pytest.skip(f"this machine has no {address}")
    target = "::1" if ":" in address else "127.0.0.1"
    with contextlib.closing(PortHolds([""])) as holds:
        port = holds.ports[""]
        with listening(port, address, option) as listener, socket.create_connection((target, port), timeout=10):
            listener.accept()[0].close()


def has_address(address: str) -> bool:
    try:
        listening(0, address, socket.SO_REUSEADDR).close()
    except OSError:
        return False
    return True


def test_ports_are_held_where_there_is_no_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "AF_INET6", 255)  # which the kernel refuses as it does IPv6 when it was not built in
    with contextlib.closing(PortHolds([""])) as holds, pytest.raises(OSError, match="in use"):
        listening(holds.ports[""], "127.0.0.1", socket.SO_KEEPALIVE)


STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"


@pytest.fixture
def orphan() -> Callable[[list[str]], subprocess.Popen[bytes]]:
    def start(command: list[str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        if command != SLEEP:
            process.stdout.readline()
        return process

    return start


def test_what_an_orphan_leaves_that_ends_while_it_is_looked_at_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no child of this process at the first look, and below nobody at the second."""
    looks = iter([[10], [10, 11], [10, 11]])
    monkeypatch.setattr(procfs, "children", lambda _pid: next(looks))
    monkeypatch.setattr(procfs, "descendants", lambda _pid: [])
    assert Orphans(frozenset).fresh() == [10, 11]


def test_orphans_are_asked_then_killed_and_keepers_are_spared(
    orphan: Callable[[list[str]], subprocess.Popen[bytes]],
) -> None:
    keepers = frozenset(procfs.children(os.getpid()))
    with orphan(SLEEP) as polite, orphan([sys.executable, "-c", STUBBORN]) as stubborn:
        orphans = Orphans(lambda: keepers)
        assert orphans.step() is None  # nobody waits for any
        orphans.begin(kill=False)
        assert orphans.step() is None
        assert polite.wait(30) == -signal.SIGTERM
        orphans.reaped([polite.pid])
        assert orphans.step() is None
        assert [survivor.pid for survivor in sweep.survivors(keepers)] == [stubborn.pid]
        orphans.begin(kill=True)
        assert orphans.step() is None
        assert stubborn.wait(30) == -signal.SIGKILL
        orphans.reaped([stubborn.pid])
        assert orphans.step() == events.OrphansGone()
        assert orphans.deadline is None


def test_orphans_that_sigkill_does_not_end_are_reported(
    orphan: Callable[[list[str]], subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal is not sent here, as if the process slept in a state that it cannot be woken from."""
    keepers = frozenset(procfs.children(os.getpid()))
    monkeypatch.setattr(sweep, "_send", lambda *_arguments: None)
    monkeypatch.setattr("harness.watchdog.orphans.KILL_LIMIT_S", 0.0)
    with orphan(SLEEP) as stuck:
        orphans = Orphans(lambda: keepers)
        orphans.begin(kill=True)
        event = orphans.step()
        assert isinstance(event, events.OrphansStuck)
        stuck.kill()
        assert [survivor.pid for survivor in event.survivors] == [stuck.pid]


REAP = """
import os
from harness.watchdog import reaping
reaping.MOST_AT_ONCE = 3
children = []
for code in range(4):
    pid = os.fork()
    if pid == 0:
        os._exit(code)
    children.append(pid)
for pid in children:
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
reaper = reaping.Reaper()
print([os.waitstatus_to_exitcode(status) for _, status in reaper.batch()], reaper.has_more, reaper.has_no_child)
print([os.waitstatus_to_exitcode(status) for _, status in reaper.batch()], reaper.has_more, reaper.has_no_child)
for _ in reaper.batch():
    pass
living, end = os.pipe()
if os.fork() == 0:
    os.close(end)
    os.read(living, 1)
    os._exit(0)
print(list(reaper.batch()), reaper.has_more, reaper.has_no_child)
"""


def test_children_are_reaped_a_batch_at_a_time_and_none_is_forgotten() -> None:
    run = subprocess.run([sys.executable, "-c", REAP], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.splitlines() == ["[0, 1, 2] True False", "[3] False True", "[] False False"]
