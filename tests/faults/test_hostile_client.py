"""What a broken or hostile client may send over the Pipe: the watchdog stays small, and leaves no server behind."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from faults.runs import TREE_SERVER, Watched
from processes import wait_for

from harness import frames, messages, procfs
from harness.forking import WatchdogProcess
from harness.messages import Failed, Launch, Launched, ServerStatus, Status, Stop, Stopped
from harness.watchdog.pending import MOST_UNANSWERED

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEADER = struct.Struct("!iIHH")
KEY = 1
TIMEOUT_S = 30.0
MIB = 1 << 20


class RawClient:
    """The client's end of a real watchdog's Pipe, with one server launched; sends what it is told to."""

    def __init__(self, directory: Path) -> None:
        self.process = WatchdogProcess(directory / "watchdog.log", crash_grace_s=0.5)
        self.socket = socket.socket(fileno=self.process.take_descriptor())
        self.socket.settimeout(TIMEOUT_S)
        self._assembler = frames.Assembler()
        self._unread = b""
        self._replies: list[tuple[int, messages.Message]] = []
        command = [sys.executable, "-I", "-S", str(TREE_SERVER), str(directory), "--ignore"]
        log = directory / "server.log"
        launch = Launch(
            "a",
            command,
            {},
            [],
            "/",
            [],
            str(log),
            str(directory),
            "root",
            0.5,
            None,
            None,
            [],
            None,
            "",
            is_literal=False,
        )
        launched = self.ask(KEY, messages.encode(launch))
        assert isinstance(launched, Launched)
        wait_for(lambda: log.exists() and b"ready" in log.read_bytes(), TIMEOUT_S, "the server is ready")
        self.launched = launched
        self.servers = procfs.descendants(launched.keeper)

    def ask(self, message_id: int, message: bytes) -> messages.Message:
        self.socket.sendall(b"".join(frames.split(message_id, message)))
        return self.reply(message_id)

    def reply(self, message_id: int) -> messages.Message:
        while True:
            for found in self._replies:
                if found[0] == message_id:
                    self._replies.remove(found)
                    return found[1]
            data = self.socket.recv(1 << 16)
            assert data, "the watchdog has closed the Pipe"
            chunks, used = frames.parse(self._unread + data)
            self._unread = (self._unread + data)[used:]
            for chunk in chunks:
                whole = self._assembler.add(chunk)
                if whole is not None:
                    self._replies.append((chunk.message_id, messages.decode(whole)))

    def assert_watched(self) -> None:
        """Check that the watchdog answers, and that its server runs."""
        status = self.ask(9_999, messages.encode(Status(KEY)))
        assert status == ServerStatus(KEY, "running", root_exited=False, returncode=None, exited_at=None, reason="")

    def peak_mib(self) -> int:
        """Give the most memory that the watchdog has had."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) // 1024


@pytest.fixture
def client(tmp_path: Path, bystander: int) -> Iterator[RawClient]:
    """Give a client; afterwards its end of the Pipe is closed, and no process of the watchdog may be left."""
    raw = RawClient(tmp_path)
    with Watched([raw.process.pid, raw.launched.keeper, *raw.servers]) as watched, Watched([bystander]) as others:
        yield raw
        raw.socket.close()
        left = watched.wait_gone(10.0)
        raw.process.end()
        assert left == [], "the client's end leaves something alive"
        assert others.alive() == [bystander]
    assert raw.process.exitcode == 0


def wire(kind: object, /, **fields: object) -> bytes:
    return json.dumps([kind, fields]).encode()


def launch_with(**wrong: object) -> bytes:
    right = Launch(
        "b",
        ["sleep", "1000"],
        {},
        [],
        "/",
        [],
        os.devnull,
        "/",
        "root",
        0.5,
        None,
        None,
        [],
        None,
        "",
        is_literal=False,
    ).as_dict()
    return wire("Launch", **{**right, **wrong})


NO_REQUESTS = {
    "nothing": b"",
    "no JSON": b"\xff\xfe",
    "half a message": launch_with()[:-9],
    "a bomb of lists": b"[" * 1_000_000,
    "a bomb of objects": b'{"a":' * 1_000_000,
    "a wide bomb": b"[" + b"[]," * 2_000_000 + b"[]]",
    "a long number": b"9" * 1_000_000,
    "an unknown kind": wire("Nothing"),
    "a class that is no message": wire("Survivor", pid=1, state="", wait_channel="", command=""),
    "a name that is a list": wire(["Status"], key=KEY),
    "a reply": wire("Done"),
    "a report of a keeper": wire("TreeEmpty"),
    "an order to a keeper": wire("KillOrder"),
    "too many fields": wire("Status", key=KEY, more=1),
    "too few fields": wire("Stop", keys=[KEY]),
    "a method for a field": wire("Status", key=KEY, __class__="Close"),
    "a key that is a text": wire("Status", key="1"),
    "a key that is a list": wire("Status", key=[KEY]),
    "a key that is a fraction": wire("Status", key=1.0),
    "a key that is true": wire("Status", key=True),
    "keys that are a number": wire("Stop", keys=KEY, grace_s=None, kill=True),
    "keys that are lists": wire("Stop", keys=[[KEY]], grace_s=None, kill=True),
    "a grace that is a text": wire("Stop", keys=[KEY], grace_s="1", kill=False),
    "a grace that is no number": wire("Stop", keys=[KEY], grace_s=math.nan, kill=False),
    "an infinite grace": wire("Stop", keys=[KEY], grace_s=math.inf, kill=False),
    "a grace that overflows": b'["Stop", {"keys": [1], "grace_s": 1e999, "kill": false}]',
    "a grace of 400 digits": wire("Stop", keys=[KEY], grace_s=10**400, kill=False),
    "a kill that is a text": wire("Stop", keys=[KEY], grace_s=None, kill="no"),
    "a wait of no length": wire("Wait", key=KEY, until="gone", timeout_s=None),
    "a wait that is no number": wire("Wait", key=KEY, until="gone", timeout_s=-math.inf),
    "a signal that is a text": wire("SendSignal", key=KEY, signal="KILL"),
    "an unknown signal": wire("SendSignal", key=KEY, signal=1_000_000),
    "a signal of 19 digits": wire("SendSignal", key=KEY, signal=10**18),
    "a server that is not there": wire("Status", key=77),
    "the key of a server that is there": launch_with(),
    "a command that is a number": launch_with(command=5),
    "a command that is a text": launch_with(command="sleep"),
    "arguments that are numbers": launch_with(command=["sleep", 1000]),
    "a command of nothing": launch_with(command=[]),
    "a NUL in the command": launch_with(command=["sl\0eep"]),
    "an environment that is a list": launch_with(environment=["A=1"]),
    "values that are numbers": launch_with(environment={"A": 1}),
    "names that cannot be": launch_with(environment={"A=B": "", "\0": ""}),
    "tokens that are not there": launch_with(templated=["A"]),
    "a port that is not there": launch_with(command=["{port:none}"]),
    "a directory that is none": launch_with(cwd="/dev/null"),
    "a log that is a directory": launch_with(log_path="/"),
    "a grace of a launch that is no number": launch_with(grace_s=math.nan),
    "a process that is not there": wire("Adopt", name="b", pid=2**22 + 1, start_time=7, grace_s=1.0),
    "a process that cannot be": wire("Adopt", name="b", pid=-1, start_time=7, grace_s=1.0),
    "a process of 19 digits": wire("Adopt", name="b", pid=10**18, start_time=7, grace_s=1.0),
}


def test_what_is_no_request_is_refused_and_the_watchdog_goes_on(client: RawClient) -> None:
    for number, (what, garbage) in enumerate(NO_REQUESTS.items(), 100):
        message_id = KEY if "is there" in what and "not" not in what else number
        reply = client.ask(message_id, garbage)
        assert isinstance(reply, Failed), (what, reply)
        client.assert_watched()
    assert client.peak_mib() < 450  # of which a wide bomb takes most, for as long as it is looked at
    stopped = client.ask(99, messages.encode(Stop([KEY], None, kill=True)))
    assert isinstance(stopped, Stopped)
    assert [outcome.how for outcome in stopped.outcomes] == ["killed"]


def test_a_time_that_is_too_long_for_the_kernel_is_waited_for(client: RawClient) -> None:
    client.socket.sendall(b"".join(frames.split(5, messages.encode(messages.Wait(KEY, "gone", 1e15)))))
    client.socket.sendall(b"".join(frames.split(6, messages.encode(Stop([KEY], 1e15, kill=False)))))
    status = client.ask(7, messages.encode(Status(KEY)))
    assert isinstance(status, ServerStatus)
    assert status.phase == "asked"
    assert isinstance(client.ask(8, messages.encode(Stop([KEY], 0.1, kill=False))), Stopped)
    assert isinstance(client.reply(6), Stopped)


@pytest.mark.parametrize(
    "garbage",
    [
        struct.pack("!i", 2**31 - 1),
        struct.pack("!i", -1),
        b"\0" * 4096,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        _HEADER.pack(8, 1, 5, 2),
        _HEADER.pack(8, 1, 0, 65535),
    ],
    ids=["a huge length", "a negative length", "zeros", "another protocol", "an impossible part", "too many parts"],
)
def test_what_is_no_frame_ends_the_run(client: RawClient, garbage: bytes) -> None:
    client.socket.sendall(garbage)
    with Watched([client.process.pid, client.launched.keeper, *client.servers]) as watched:
        # The test process lives and holds its end open: it is the watchdog that gives it up.
        assert watched.wait_gone(10.0) == []


def test_messages_without_an_end_do_not_fill_the_memory(client: RawClient) -> None:
    data = bytes(frames.CHUNK_BYTES)
    parts = frames.MESSAGE_BYTES // frames.CHUNK_BYTES
    for message_id in range(1_000, 1_010):
        for part in range(parts):  # of parts + 1: about 80 MiB in all
            head = _HEADER.pack(8 + len(data), message_id, part, parts + 1)
            client.socket.sendall(head + data)
    client.assert_watched()
    assert client.peak_mib() < 64


@pytest.mark.parametrize("cut", [1, 4, 11, 20])
def test_half_a_frame_holds_up_nothing(client: RawClient, cut: int) -> None:
    (frame,) = frames.split(5, messages.encode(Status(KEY)))
    client.socket.sendall(bytes(frame)[:cut])
    with Watched([client.process.pid, client.launched.keeper, *client.servers]) as watched:
        os.kill(client.process.pid, signal.SIGTERM)  # the second entrance, for a run that hangs
        assert watched.wait_gone(10.0) == []


def test_a_client_that_asks_but_never_reads_does_not_fill_the_memory(client: RawClient) -> None:
    request = b"".join(frames.split(7, messages.encode(Status(KEY)))) * 500
    sent = 0
    client.socket.settimeout(1.0)
    with contextlib.suppress(TimeoutError):
        while sent < 100 * MIB:
            sent += client.socket.send(request)
    assert sent < 100 * MIB
    assert client.peak_mib() < 32
    client.socket.settimeout(TIMEOUT_S)
    for _ in range(sent // len(request) * 500):  # once it reads, it is listened to again
        client.reply(7)


def test_requests_that_wait_for_ever_do_not_fill_the_memory(client: RawClient) -> None:
    wait = messages.encode(messages.Wait(KEY, "gone", 1e6))
    for message_id in range(1_000, 1_000 + MOST_UNANSWERED):
        client.socket.sendall(b"".join(frames.split(message_id, wait)))
    refused: Any = client.ask(500, wait)
    assert isinstance(refused, Failed)
    assert "wait for their replies" in refused.message
    with Watched(client.servers) as watched:
        os.kill(client.launched.pid, signal.SIGKILL)
        client.socket.sendall(b"".join(frames.split(KEY + 1, messages.encode(messages.Close()))))
        assert isinstance(client.reply(KEY + 1), Stopped)
        assert watched.alive() == []
