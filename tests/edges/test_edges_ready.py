"""Readiness: every check, on servers that behave, misbehave and die, and on ports that somebody else answers on."""

from __future__ import annotations

import re
import socket
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from servers.commands import READY_S, family, member, pid_of, web

import harness
from harness import readiness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# What is said of one more request that was under way when the time was over.
UNDER_WAY = "the port is open, but the request is not answered"


def not_ready(watchdog: harness.Watchdog, behaviour: str | int, ready: Callable[[harness.Server], bool]) -> str:
    """Launch a web server that does not get ready, and give what the error says."""
    server = watchdog.launch(web(behaviour), ready=harness.log_line("listening"), name="rank0").wait_ready(READY_S)
    server.ready = ready
    with pytest.raises(harness.NotReady) as caught:
        server.wait_ready(3.0)
    assert caught.value.server == "rank0"
    assert "listening" in caught.value.log_tail
    assert server.state == "running"
    assert caught.value.message.startswith(f"'rank0' (pid {server.pid}) was not ready after 3 s, waiting for ")
    return caught.value.message


# ---- http_ok


def test_http_200(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(web(200), ready=harness.http_ok()).wait_ready(READY_S)
    assert "GET /health HTTP/1.1" in server.log_tail()
    assert server.wait_ready(READY_S) is server


def test_http_another_status_path_and_port(watchdog: harness.Watchdog) -> None:
    command = web(401)
    command[command.index("{port}")] = "{port:admin}"
    server = watchdog.launch(command, ports=["admin"])
    server.ready = harness.http_ok("/v1?a=%20&b", status=401, port=server.ports["admin"])
    assert "GET /v1?a=%20&b HTTP/1.1" in server.wait_ready(READY_S).log_tail()


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a request that blocks the wait cost a minute, which shows on the busiest machine."""
    monkeypatch.setattr(readiness, "_PATIENCE_S", 60.0)
    monkeypatch.setattr(readiness, "_ONCE_S", 60.0)


@pytest.mark.usefixtures("_patient")
def test_http_a_silent_server_is_given_up_in_time(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(web("silent"), ready=harness.log_line("listening")).wait_ready(READY_S)
    server.ready = harness.http_ok()
    began = time.monotonic()
    with pytest.raises(harness.NotReady, match="/health: the port is open, but the request is not answered"):
        server.wait_ready(0.4)
    assert time.monotonic() - began < 20.0


@pytest.mark.usefixtures("_patient")
def test_http_a_silent_server_does_not_hold_up_the_others(watchdog: harness.Watchdog) -> None:
    with watchdog.group("dp") as group:
        for behaviour in ("silent", "silent", "silent"):
            group.launch(web(behaviour), ready=harness.port_open())
        group.launch(["sh", "-c", "echo ready; exec sleep 60"], name="dies", ready=harness.log_line("ready"))
        group.wait_ready(READY_S)
        for server in group.servers:
            server.ready = harness.http_ok()
        killer = threading.Timer(0.1, group.servers[3].proc.kill)
        killer.start()
        began = time.monotonic()
        with pytest.raises(harness.ServerExited, match="'dies'"):
            group.wait_ready(60.0)
        killer.join()
        assert time.monotonic() - began < 30.0


def test_http_503_first(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(web("late"), ready=harness.http_ok("/")).wait_ready(READY_S)
    assert server.log_tail().count("GET / HTTP/1.1") == 4


def test_http_needs_the_status_that_was_named(watchdog: harness.Watchdog) -> None:
    said = not_ready(watchdog, 200, harness.http_ok(status=204))
    assert said.endswith("HTTP 204 from /health: it answered 200")


def test_a_wrong_answer_is_asked_for_more_and_more_slowly(watchdog: harness.Watchdog) -> None:
    not_ready(watchdog, 503, harness.http_ok())
    assert 3 <= watchdog.servers[0].log_tail().count("GET") <= 60


@pytest.mark.parametrize(
    ("behaviour", "seen"),
    [
        ("garbage", "its answer is not HTTP"),
        ("closes", "its answer broke off: "),
    ],
)
def test_http_no_proper_answer(watchdog: harness.Watchdog, behaviour: str, seen: str) -> None:
    said = not_ready(watchdog, behaviour, harness.http_ok())
    assert f"HTTP 200 from /health: {seen}" in said


def test_a_users_check_is_asked_more_and_more_slowly(watchdog: harness.Watchdog) -> None:
    asked: list[harness.Server] = []

    def never(server: harness.Server) -> bool:
        asked.append(server)
        return False

    server = watchdog.launch(["sleep", "60"], ready=never)
    with pytest.raises(harness.NotReady):
        server.wait_ready(1.0)
    assert 3 <= len(asked) <= 30


def test_http_nobody_listens(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(["sleep", "60"], ready=harness.http_ok(), ready_timeout_s=0.2)
    with pytest.raises(harness.NotReady, match=r"not ready after 0\.2 s, .*: nothing listens on the port"):
        server.wait_ready()


def test_http_an_answer_that_drips_does_not_hold_up_the_wait(watchdog: harness.Watchdog) -> None:
    watchdog.launch(web("drip"), ready=harness.log_line("listening")).wait_ready(READY_S).ready = harness.http_ok()
    timer = threading.Timer(30.0, watchdog.servers[0].kill)  # so that this test ends, whatever happens
    timer.start()
    began = time.monotonic()
    with pytest.raises(harness.HarnessError):
        watchdog.servers[0].wait_ready(0.3)
    timer.cancel()
    timer.join()
    assert time.monotonic() - began < 25.0


def test_http_an_answer_without_end_is_enough_when_its_status_is_there(watchdog: harness.Watchdog) -> None:
    watchdog.launch(web("flood"), ready=harness.log_line("listening")).wait_ready(READY_S).ready = harness.http_ok()
    timer = threading.Timer(30.0, watchdog.servers[0].kill)  # so that this test ends, whatever happens
    timer.start()
    began = time.monotonic()
    watchdog.servers[0].wait_ready(READY_S)
    timer.cancel()
    timer.join()
    assert time.monotonic() - began < 25.0


def test_http_a_connection_that_was_lost_on_the_way_is_made_anew(watchdog: harness.Watchdog) -> None:
    watchdog.launch(web("second"), ready=harness.http_ok()).wait_ready(READY_S)


def test_checks_can_be_called_from_a_check(watchdog: harness.Watchdog) -> None:
    port, line = harness.port_open(), harness.log_line("listening")
    watchdog.launch(web(200), ready=lambda server: port(server) and line(server)).wait_ready(READY_S)
    assert port(watchdog.servers[0])


def test_http_ok_can_be_called_from_a_check(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(web(200), ready=harness.port_open()).wait_ready(READY_S)
    assert [harness.http_ok()(server) for _ in range(5)] == [True] * 5


# ---- port_open


def test_port_open(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(web(200), ready=harness.port_open()).wait_ready(READY_S)
    server.ready = harness.port_open(port=server.port)
    assert server.wait_ready(READY_S) is server
    assert "nothing listens on the port" in not_ready(watchdog, 200, harness.port_open(port=1))


def test_a_port_that_a_child_listens_on(watchdog: harness.Watchdog) -> None:
    command = ["sh", "-c", '"$@" & wait', "sh", *web(200)]
    watchdog.launch(command, ready=harness.port_open(), ask="group").wait_ready(READY_S)


@contextmanager
def foreigner(port: int) -> Iterator[None]:
    """Answer every request on a server's port from this process."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        thread = threading.Thread(target=_answer_all, args=(listener,))
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _answer_all(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            if connection.recv(65536):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.parametrize("ready", [harness.http_ok(), harness.port_open()], ids=repr)
def test_a_foreign_process_on_the_port_is_not_the_server(
    watchdog: harness.Watchdog, ready: Callable[[harness.Server], bool]
) -> None:
    server = watchdog.launch(["sleep", "60"], ready=ready)
    with foreigner(server.port), pytest.raises(harness.NotReady) as caught:
        server.wait_ready(0.5)
    assert re.search(f"(a process that is not this server's .*|{UNDER_WAY})$", caught.value.message)
    assert server.state == "running"


# ---- log_line


@pytest.mark.parametrize("pattern", ["^up on [0-9]+$", re.compile("UP ON", re.IGNORECASE)], ids=["text", "compiled"])
def test_log_line(watchdog: harness.Watchdog, pattern: str | re.Pattern[str]) -> None:
    script = "echo starting; printf 'up'; printf ' on '; echo 8000; exec sleep 60"
    server = watchdog.launch(["sh", "-c", script], ready=harness.log_line(pattern)).wait_ready(READY_S)
    assert "up on 8000" in server.log_tail()


def test_a_log_line_that_comes_in_pieces(watchdog: harness.Watchdog) -> None:
    seen: list[str] = []

    def half(server: harness.Server) -> bool:
        seen.append(server.log_tail())
        return seen[-1] == "ser"

    script = "trap 'echo ving; exec sleep 60' USR1; printf ser; while :; do sleep 0.01; done"
    server = watchdog.launch(["sh", "-c", script], ready=half).wait_ready(READY_S)
    server.ready = harness.log_line("^serving$")
    with pytest.raises(harness.NotReady, match=r"a log line that matches '\^serving\$': no line of its log matches"):
        server.wait_ready(0.1)
    server.send_signal(10)
    server.wait_ready(READY_S)


def test_a_log_line_behind_binary_and_endless_output(watchdog: harness.Watchdog) -> None:
    script = r'head -c 3000000 /dev/zero | tr "\000" "\377"; printf "\000\n"; echo here; exec sleep 60'
    watchdog.launch(["sh", "-c", script], ready=harness.log_line("^here$")).wait_ready(READY_S)


def test_a_log_that_stays_empty(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(["sleep", "60"], ready=harness.log_line("x"))
    with pytest.raises(harness.NotReady, match="its log is empty"):
        server.wait_ready(0.1)


# ---- any callable


def test_a_callable_is_asked_until_it_is_true(watchdog: harness.Watchdog) -> None:
    asked: list[harness.Server] = []

    def third(server: harness.Server) -> bool:
        asked.append(server)
        return len(asked) == 3

    server = watchdog.launch(["sleep", "60"], ready=third)
    assert server.wait_ready(READY_S) is server
    assert asked == [server] * 3


def test_a_callable_that_raises_stops_the_server(watchdog: harness.Watchdog) -> None:
    def broken(server: harness.Server) -> bool:
        raise KeyError(server.name)

    server = watchdog.launch(["sh", "-c", "echo hello; exec sleep 60"], name="rank0", ready=broken)
    with pytest.raises(
        harness.NotReady, match=r"'rank0'.* failed its readiness check .*: KeyError\('rank0'\)"
    ) as caught:
        server.wait_ready(READY_S)
    assert isinstance(caught.value.__cause__, KeyError)
    assert (server.state, server.returncode) == ("gone", -15)


def test_a_callable_that_never_holds(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(["sleep", "60"], ready=lambda _: False, ready_timeout_s=0.1)
    with pytest.raises(harness.NotReady, match=r"after 0\.1 s, waiting for .*<lambda>.*: the check gave False"):
        server.wait_ready()
    assert server.is_alive


# ---- servers that end


@pytest.mark.parametrize(
    "ready", [None, harness.http_ok(), harness.port_open(), harness.log_line("never"), lambda _: False]
)
def test_a_server_that_exits_is_reported_with_its_code_and_log(
    watchdog: harness.Watchdog, ready: Callable[[harness.Server], bool] | None
) -> None:
    server = watchdog.launch(["sh", "-c", "echo CUDA out of memory >&2; exit 3"], name="rank0", ready=ready)
    assert server.proc.wait(READY_S) == 3
    with pytest.raises(harness.ServerExited) as caught:
        server.wait_ready(READY_S)
    assert f"'rank0' (pid {server.pid}) ended with exit code 3 after " in str(caught.value)
    assert "  | CUDA out of memory" in str(caught.value)
    assert (caught.value.server, caught.value.returncode, caught.value.log_tail) == ("rank0", 3, "CUDA out of memory")


def test_a_server_that_exits_during_the_wait_ends_it_at_once(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(["sh", "-c", "echo up; exec sleep 60"], ready=harness.log_line("up")).wait_ready(READY_S)
    server.ready = harness.port_open()
    killer = threading.Timer(0.1, server.proc.kill)
    killer.start()
    with pytest.raises(harness.ServerExited, match="killed by SIGKILL"):
        server.wait_ready(60.0)
    killer.join()


@pytest.mark.parametrize("ready", [harness.log_line("done"), lambda _: True], ids=["log_line", "callable"])
def test_a_server_that_exits_with_0_is_not_ready(
    watchdog: harness.Watchdog, ready: Callable[[harness.Server], bool]
) -> None:
    server = watchdog.launch(["echo", "done"], ready=ready)
    server.wait(READY_S)
    with pytest.raises(harness.ServerExited, match="ended with exit code 0"):
        server.wait_ready(READY_S)


def test_a_root_that_fails_and_leaves_something_is_stopped_as_a_whole(watchdog: harness.Watchdog) -> None:
    plan = member("root", member("daemon", daemon=True), leaves=True, code=4)
    server = watchdog.launch(family(plan), ready=harness.port_open())
    with pytest.raises(harness.ServerExited, match="exit code 4"):
        server.wait_ready(READY_S)
    assert server.state == "gone"
    assert pid_of(server, "daemon") not in server.pids()


def test_waiting_for_a_daemon_costs_no_more_than_for_any_other(
    watchdog: harness.Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = member("root", member("daemon", daemon=True), leaves=True)
    server = watchdog.launch(family(plan), ready=harness.port_open())
    asked: list[float] = []
    status = harness.Server.status

    def counted(self: harness.Server) -> object:
        asked.append(time.monotonic())
        return status(self)

    monkeypatch.setattr(harness.Server, "status", counted)
    with pytest.raises(harness.NotReady):  # the root exits soon after this wait has begun
        server.wait_ready(4.0)
    assert server.state == "detached"
    assert len(asked) < 700, len(asked)  # without a pause between them, tens of thousands
