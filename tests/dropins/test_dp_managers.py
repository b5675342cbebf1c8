"""Managers of data-parallel deployments as vLLM's tests have them, on the drop-in's servers."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import processes
import pytest
from dropins.managers import KINDS, MODEL, ExternalLBServerManager, Manager, Options, make
from dropins.serving import Server
from edges.conftest import assert_listens_nobody
from gpu.conftest import library, standin
from servers.commands import READY_S

import harness

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gpu.machine import Standin

__all__ = ["library", "standin"]

TESTS = Path(__file__).parents[1]
# Below the ports that the kernel gives out by itself.
_PORTS = range(20000, 32000, 8)
ENGINE, WORKER, API = "VLLM::EngineCor", "VLLM::Worker_TP", "VLLM::APIServer"


@pytest.fixture
def port() -> Iterator[int]:
    """Give the first of a block of ports that are this test's: no other that takes its ports like this has any."""
    for first in random.sample(_PORTS, 100):
        with contextlib.ExitStack() as holds:
            try:
                for number in range(first, first + _PORTS.step):
                    _hold(holds.enter_context(socket.socket()), number)
            except OSError:
                continue
            yield first
            return
    pytest.fail("no block of ports is free")


def _hold(holder: socket.socket, number: int) -> None:
    # Refused if anybody else has it, and once it is had, servers that set one of these options may listen on it.
    holder.bind(("", number))
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def options(port: int, *environments: dict[str, str], **more: object) -> Options:
    """Give options of a manager whose servers have these environments, of which the last is that of all others."""
    given = {number: environments[min(number, len(environments) - 1)] for number in range(8 if environments else 0)}
    return Options(port, port + _PORTS.step - 1, environments=given)._replace(**more)  # type: ignore[arg-type]


def completion_of(server: Server) -> str:
    """Ask a server, or the head of a headless one, for a completion."""
    body = json.dumps({"model": MODEL, "prompt": "Hello, my name is"}).encode()
    with urllib.request.urlopen(server.url_for("v1", "completions"), body, timeout=READY_S) as answer:  # noqa: S310
        text: str = json.load(answer)["choices"][0]["text"]
        return text


def people_of(servers: Sequence[Server]) -> list[processes.Identity]:
    return processes.identities(pid for server in servers for pid in server.server.pids())


def count(people: Sequence[processes.Identity], name: str) -> int:
    return [processes.name(who.pid) for who in people].count(name)


def assert_gone(people: Sequence[processes.Identity], port: int) -> None:
    left = [who.pid for who in people if processes.is_running(who)]
    assert not left, processes.describe(left)
    for number in range(port, port + _PORTS.step):
        assert_listens_nobody(number)


def ends(servers: Sequence[Server]) -> list[tuple[str, int | None]]:
    outcomes = [server.server.outcome for server in servers]
    return [(outcome.how, outcome.returncode) for outcome in outcomes if outcome is not None]


def assert_ends_at_once(manager: Manager, servers: Sequence[Server]) -> None:
    """Stop all; it must take the time of the slowest, and not that of all one after another."""
    began = time.monotonic()
    manager.__exit__()
    whole = time.monotonic() - began
    times = [server.server.outcome.seconds for server in servers if server.server.outcome is not None]
    assert len(times) == len(servers)
    assert whole < (max(times) + sum(times)) / 2, f"{whole:.2f} s for {times}"


# ---- in this process


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("api_server_count", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_each_server_answers_and_ends_as_it_should(kind: str, api_server_count: int, port: int, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    manager = make(kind, options(port, {"STANDIN_BROKEN": str(broken)}, api_server_count=api_server_count, tp_size=2))
    with manager as servers:
        people = people_of(servers)
        assert all(map(completion_of, servers))
        engines = 4 if kind == "hybrid" else 2
        assert (count(people, ENGINE), count(people, WORKER)) == (engines, 2 * engines)
        # A single one is the root itself.
        with_api = 2 if kind in {"external", "hybrid"} else 1
        assert count(people, API) == (0 if api_server_count == 1 else api_server_count * with_api)
    assert ends(servers) == [("asked", 0), ("asked", 0)]
    assert not broken.exists(), broken.read_text(encoding="utf-8")
    assert_gone(people, port)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("kind", KINDS)
def test_all_end_in_the_time_of_the_slowest(kind: str, port: int) -> None:
    takes_s = [2.4, 2.2, 2.0, 1.8]
    manager = make(kind, options(port, *({"STANDIN_STOP_S": str(each)} for each in takes_s)), nodes=4)
    servers = manager.__enter__()
    assert len(servers) == (2 if kind == "api-only" else 4)
    assert_ends_at_once(manager, servers)
    assert max(server.server.outcome.seconds for server in servers if server.server.outcome is not None) >= takes_s[0]


@pytest.mark.usefixtures("own")
def test_a_manager_may_be_used_in_another_thread(port: int) -> None:
    done: list[tuple[str, int | None]] = []

    def use() -> None:
        with make("internal", options(port)) as servers:
            assert all(map(completion_of, servers))
        done.extend(ends(servers))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert done == [("asked", 0), ("asked", 0)]


class Impatient(Server):
    """vLLM's grace is 15 s."""

    def _get_process_termination_timeout(self) -> float:
        return 4.0


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_that_does_not_end_is_killed_and_the_others_are_asked(kind: str, port: int) -> None:
    environments: list[dict[str, str]] = [{}, {"STANDIN_STUBBORN": "1"}]
    with make(kind, options(port, *environments, server_class=Impatient)) as servers:
        people = people_of(servers)
    # Some managers have their servers in the order in which they became ready.
    first, second = ends(sorted(servers, key=lambda server: server.port or 0))
    assert first == ("asked", 0)
    assert second[0] == "killed"
    assert_gone(people, port)


@pytest.mark.usefixtures("own")
def test_a_rank_that_is_added_later_ends_with_the_others(port: int, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    environment = {"STANDIN_BROKEN": str(broken), "STANDIN_STOP_S": "0.6"}
    manager = ExternalLBServerManager(2, options(port, environment))
    servers = manager.__enter__()
    servers.append(manager.start_rank(2, dp_size=3))
    people = people_of(servers)
    assert all(map(completion_of, servers))
    assert sorted(server.port or 0 for server in servers) == [port, port + 1, port + 2]
    assert_ends_at_once(manager, servers)
    assert ends(servers) == [("asked", 0)] * 3
    assert not broken.exists(), broken.read_text(encoding="utf-8")
    assert_gone(people, port)


@pytest.mark.usefixtures("own")
def test_an_added_rank_that_fails_leaves_the_others_alone(port: int) -> None:
    manager = ExternalLBServerManager(2, options(port, {"STANDIN_FAIL_RANK": "2"}))
    with manager as servers:
        with pytest.raises(harness.ServerExited, match="exit code 3"):
            manager.start_rank(2, dp_size=3)
        assert all(map(completion_of, servers))
    assert ends(servers) == [("asked", 0), ("asked", 0)]


# ---- in runs of their own

_HEAD = """
import sys
sys.path.insert(0, {tests!r})
import ctypes, json, os, pathlib, signal, time
import processes
import pytest
from dropins.managers import Options, make
from dropins.test_dp_managers import Hasty, completion_of, options, people_of

HERE = pathlib.Path(__file__).parent
BROKEN = HERE / "broken"
KIND, PORT = {kind!r}, {port}
NOTED = {{"STANDIN_BROKEN": str(BROKEN)}}

def tell(servers):
    (HERE / "people").write_text(json.dumps(people_of(servers)))
"""


def run(pytester: pytest.Pytester, kind: str, port: int, suite: str, *settings: str) -> pytest.RunResult:
    pytester.makepyfile(test_it=_HEAD.format(tests=str(TESTS), kind=kind, port=port) + suite)
    pytester.makeini("\n".join(["[pytest]", "harness_crash_grace_s = 1", *settings]))
    # Without what is tested here a server waits 480 s for one that has failed.
    return pytester.run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", timeout=100)


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the state of the runs in the test's own directory."""
    monkeypatch.setenv("HARNESS_STATE_DIR", str(tmp_path / "state"))


class Hasty(Server):
    """vLLM's limit is 480 s."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Start, and wait for a short time."""
        super().__init__(*arguments, **named, max_wait_seconds=6.0)


FAILS = 'NOTED | {"STANDIN_FAIL_RANK": "1"}'
# The first is ready, and so in nobody's hands, when the second is given up.
FAILS_LATE = 'NOTED, NOTED | {"STANDIN_503": "1"}, server_class=Hasty'


@pytest.mark.parametrize(
    ("kind", "fails", "says"),
    [pytest.param(kind, FAILS, "exit code 3", id=kind) for kind in KINDS]
    + [pytest.param(kind, FAILS_LATE, "it answered 503", id=f"{kind}-late") for kind in ("external", "hybrid")],
)
def test_a_rank_that_fails_is_one_error_and_the_next_test_has_the_same_ports(
    kind: str, fails: str, says: str, port: int, pytester: pytest.Pytester
) -> None:
    suite = f"""
@pytest.fixture(scope="module")
def failing():
    with make(KIND, options(PORT, {fails})) as servers:
        yield servers

def test_fails(failing):
    pass

@pytest.fixture(scope="module")
def servers(watchdog):
    assert [server.has_ended for server in watchdog.servers] == [True, True]
    assert [server.pids() for server in watchdog.servers] == [[], []]
    assert not BROKEN.exists(), BROKEN.read_text()
    with make(KIND, options(PORT)) as servers:
        yield servers

def test_next(servers):
    assert all(map(completion_of, servers))
    tell(servers)
"""
    result = run(pytester, kind, port, suite)
    result.assert_outcomes(passed=1, errors=1, warnings=result.parseoutcomes().get("warnings", 0))
    result.stdout.fnmatch_lines(["*Exception: Servers failed to start*"])
    result.stdout.fnmatch_lines(["ERROR test_it.py::test_fails - *"])
    result.stdout.fnmatch_lines([f"*{says}*"])
    result.stdout.no_fnmatch_line("*LEAK*")
    assert_gone(told(pytester), port)


def told(pytester: pytest.Pytester) -> list[processes.Identity]:
    """Give the processes of the run's servers."""
    found = json.loads((pytester.path / "people").read_text(encoding="utf-8"))
    return [processes.Identity(*who) for who in found]


def test_an_error_that_a_manager_swallows_is_an_error_of_the_test(
    port: int, standin: Standin, pytester: pytest.Pytester
) -> None:
    suite = f"""
RESIDUE = pathlib.Path(os.environ["STANDIN_NVML"]) / "residue.{standin.uuids[1]}"

@pytest.fixture(scope="module", params=[1, 4])
def servers(request):
    RESIDUE.unlink(missing_ok=True)
    more = dict(api_server_count=request.param, visible_devices="CUDA_VISIBLE_DEVICES")
    with make(KIND, options(PORT, **more)) as servers:
        yield servers

def test_first(servers):
    assert sorted(server.server.gpus for server in servers) == {[(uuid,) for uuid in standin.uuids]!r}

def test_last(servers, request):
    tell(servers)
    if request.node.callspec.params["servers"] == 1:
        RESIDUE.write_text("9000")
"""
    result = run(pytester, "external", port, suite, "harness_gpu_release_s = 0.5")
    result.assert_outcomes(passed=4, errors=1)
    result.stdout.fnmatch_lines(["Error stopping servers: *", f"*{standin.uuids[1]}*: held after*"])
    result.stdout.fnmatch_lines(["ERROR test_it.py::test_last[[]1] - *GpuNotReleased*"])
    assert_gone(told(pytester), port)


HANGS_IN_C = "ctypes.PyDLL(None).sleep(600)"  # until its process is ended; it holds the GIL
ENDS = [pytest.param(kind, "os.kill(os.getpid(), signal.SIGKILL)", id=f"{kind}-SIGKILL") for kind in KINDS]
ENDS += [
    pytest.param("internal", "os._exit(3)", id="internal-_exit"),
    pytest.param("hybrid", HANGS_IN_C, id="hybrid-C"),
]


@pytest.mark.parametrize(("kind", "end"), ENDS)
def test_no_end_of_pytest_leaves_a_process(kind: str, end: str, port: int, pytester: pytest.Pytester) -> None:
    suite = f"""
@pytest.fixture(scope="module")
def servers():
    with make(KIND, options(PORT, {{"STANDIN_STUBBORN": "1"}}, {{"STANDIN_DAEMON": "1"}})) as servers:
        yield servers

def test_up(servers):
    tell(servers)

@pytest.mark.harness_deadline({"1" if end == HANGS_IN_C else "None"})
def test_end(servers):
    {end}
"""
    result = run(pytester, kind, port, suite, "harness_deadline_grace_s = 1")
    assert result.ret == (3 if "_exit" in end else -9)
    people = told(pytester)
    assert len(people) >= 6
    processes.wait_gone(people, READY_S)
    assert_gone(people, port)
