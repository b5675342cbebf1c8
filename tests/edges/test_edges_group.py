"""Groups: names, threads, waiting for all at once, stopping in parallel, leaving with an error."""

from __future__ import annotations

import inspect
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import processes
import pytest
from servers.commands import READY_S, STUBBORN, family, member, time_of

import harness

if TYPE_CHECKING:
    from collections.abc import Callable


def test_names_are_given_and_unique(watchdog: harness.Watchdog) -> None:
    with watchdog.group("dp") as group, watchdog.group() as other:
        servers = [group.launch(["sleep", "60"], name=name) for name in (None, "dp-2", None, None)]
        assert [server.name for server in servers] == ["dp-0", "dp-2", "dp-3", "dp-4"]
        with pytest.raises(harness.SpecError, match=r"group 'dp' has a server named 'dp-2' already"):
            group.launch(["sleep", "60"], name="dp-2")
        assert other.launch(["sleep", "60"], name="dp-2").is_alive
        assert group.name == "dp"
        assert other.name.startswith("group-")
        assert group.servers == tuple(servers)
        assert "dp-3" in repr(group)
        assert len(watchdog.servers) == 5
    assert {server.state for server in watchdog.servers} == {"gone"}


def test_a_server_that_was_stopped_can_be_launched_again(watchdog: harness.Watchdog) -> None:
    with watchdog.group("dp") as group:
        group.launch(["sleep", "60"], name="rank0")
        with pytest.raises(harness.SpecError, match="already"):
            group.launch(["sleep", "60"], name="rank0")
        group.servers[0].stop()
        group.wait_ready(READY_S)
        again = group.launch(["sleep", "60"], name="rank0")
        group.wait_ready(READY_S)
        assert again.is_alive
    assert [server.outcome.how for server in group.servers if server.outcome] == ["asked", "asked"]


def test_a_group_survives_a_launch_that_fails(watchdog: harness.Watchdog) -> None:
    with watchdog.group("dp") as group:
        for command in (["/no/such/program"], [""]):
            with pytest.raises((harness.LaunchFailed, harness.SpecError)):
                group.launch(command, name="rank0")
        assert group.servers == ()
        server = group.launch(["sleep", "60"], name="rank0")
        assert group.wait_ready() is group
        report = group.stop()
    assert [outcome.name for outcome in report.outcomes] == ["rank0"]
    assert server.returncode == -15


def test_servers_are_launched_from_many_threads(watchdog: harness.Watchdog) -> None:
    with watchdog.group("many") as group, ThreadPoolExecutor(8) as pool:
        launches = [
            pool.submit(group.launch, ["sh", "-c", f"echo {number}; exec sleep 60"], ready=harness.log_line("^"))
            for number in range(24)
        ]
        servers = [launch.result() for launch in launches]
        group.wait_ready(READY_S)
        assert set(group.servers) == set(servers)
        assert len({server.name for server in servers}) == len({server.port for server in servers}) == 24
        assert sorted(int(server.log_tail()) for server in servers) == list(range(24))
        stops = [pool.submit(server.stop) for server in servers[:8]]
        assert {stop.result().how for stop in stops} == {"asked"}
    assert {server.state for server in servers} == {"gone"}


def test_all_are_waited_for_at_once(watchdog: harness.Watchdog) -> None:
    asked: set[str] = set()

    def when_all_were_asked(server: harness.Server) -> bool:
        asked.add(server.name)
        return len(asked) == 3

    with watchdog.group("dp") as group:
        for _ in range(3):
            group.launch(["sleep", "60"], ready=when_all_were_asked)
        group.wait_ready(timeout_s=READY_S)
    assert asked == {"dp-0", "dp-1", "dp-2"}


def test_the_first_that_dies_ends_the_wait(watchdog: harness.Watchdog) -> None:
    with watchdog.group("dp") as group:
        group.launch(["sleep", "60"], ready=harness.port_open())
        group.launch(["sh", "-c", "echo no device >&2; exit 3"], name="bad", ready=harness.port_open())
        began = time.monotonic()
        with pytest.raises(harness.ServerExited, match="no device") as caught:
            group.wait_ready(timeout_s=60)
        assert time.monotonic() - began < 30
        assert (caught.value.server, caught.value.returncode) == ("bad", 3)
        assert group.servers[0].is_alive


def test_each_server_has_its_own_time_to_get_ready(watchdog: harness.Watchdog) -> None:
    with watchdog.group("dp") as group:
        group.launch(["sleep", "60"], ready=lambda _: False)
        group.launch(["sleep", "60"], name="short", ready=lambda _: False, ready_timeout_s=0.1)
        with pytest.raises(harness.NotReady, match=r"'short'.* was not ready after 0\.1 s"):
            group.wait_ready()
        with pytest.raises(harness.NotReady, match=r"was not ready after 0\.05 s"):
            group.wait_ready(timeout_s=0.05)


def test_a_group_stops_in_parallel(watchdog: harness.Watchdog) -> None:
    with watchdog.group("dp") as group:
        for _ in range(4):
            group.launch(family(member(takes_s=2.0)), ready=harness.log_line("^root ready"))
        group.wait_ready(READY_S)
        began = time.monotonic()
    took_s = time.monotonic() - began
    asked, ends = ([time_of(server, "root", what) for server in group.servers] for what in ("asked", "ends"))
    assert max(asked) < min(ends)
    assert took_s < 5.0  # one after the other they would take 8 s and more


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_leaving_with_an_error_stops_all_and_keeps_the_error(
    watchdog: harness.Watchdog, error: type[BaseException]
) -> None:
    def fail() -> None:
        with watchdog.group("dp") as group:
            servers.append(group.launch(["sleep", "60"]))
            servers.append(group.launch(STUBBORN, grace_s=0.2, ready=harness.log_line("ready")))
            group.wait_ready(READY_S)
            raise error("from the body")

    servers: list[harness.Server] = []
    with pytest.raises(error, match="from the body"):
        fail()
    assert [server.stop().how for server in servers] == ["asked", "killed"]


def test_a_group_that_was_left_launches_nothing_more(watchdog: harness.Watchdog) -> None:
    with watchdog.group("dp") as group:
        pass
    with pytest.raises(harness.HarnessError, match="group 'dp' has been left"):
        group.launch(["sleep", "60"])
    assert watchdog.servers == ()


def test_a_launch_that_is_under_way_when_the_group_is_left(watchdog: harness.Watchdog) -> None:
    errors: list[BaseException] = []

    def launch_on() -> None:
        try:
            while True:
                group.launch(["sleep", "60"])
        except harness.HarnessError as error:
            errors.append(error)

    with watchdog.group("dp") as group:
        threads = [threading.Thread(target=launch_on) for _ in range(4)]
        for thread in threads:
            thread.start()
        processes.wait_for(lambda: len(group.servers) >= 4, READY_S, "some servers")
    for thread in threads:
        thread.join()
    assert len(errors) == 4
    assert {server.state for server in watchdog.servers} == {"gone"}


def test_the_rest_of_the_signatures_is_the_contracts() -> None:
    expected: dict[Callable[..., object], dict[str, object]] = {
        harness.Watchdog.group: {"name": None, "gpus": None},
        harness.Watchdog.stop: {"servers": inspect.Parameter.empty, "grace_s": None},
        harness.Watchdog.adopt: {"pid": inspect.Parameter.empty, "name": None, "grace_s": 15.0},
        harness.Watchdog.close: {},
        harness.ServerGroup.wait_ready: {"timeout_s": None},
        harness.ServerGroup.stop: {"grace_s": None},
        harness.Server.wait_ready: {"timeout_s": None},
        harness.Server.wait: {"timeout_s": None},
        harness.Server.stop: {"grace_s": None},
        harness.Server.kill: {},
        harness.Server.send_signal: {"sig": inspect.Parameter.empty},
        harness.Server.log_tail: {"lines": 50},
        harness.Server.url: {"path": ""},
        harness.http_ok: {"path": "/health", "status": 200, "port": None},
        harness.port_open: {"port": None},
        harness.log_line: {"pattern": inspect.Parameter.empty},
    }
    for function, options in expected.items():
        parameters = dict(inspect.signature(function).parameters)
        parameters.pop("self", None)
        assert {name: parameter.default for name, parameter in parameters.items()} == options, function
