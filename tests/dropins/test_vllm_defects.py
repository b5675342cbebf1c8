"""What vLLM's own server class cannot do, each as a test that passes here.

First its readiness check (a to e), then ten points: 1 the end of pytest in every way, 2 signals to it while servers
were made off the main thread, 3 an interrupted teardown, 4 a start of which one part fails (test_dp_managers.py has
more), 5 a parallel stop in an emergency, 6 no wait for who cannot come, 7 parallel workers, 8 memory of its own devices
alone, 9 reports that say why, 10 processes that have left, and forked children.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import processes
import pytest
from dropins.serving import Plain, Server
from gpu.conftest import library, standin
from gpu.machine import Machine
from servers.commands import FOLDER, READY_S

import harness
from harness import current
from harness.vllm import RemoteVLLMServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from gpu.machine import Standin

__all__ = ["library", "standin"]

# ---- a to e: readiness


@pytest.mark.parametrize(
    ("variable", "seen"),
    [("STANDIN_503", "it answered 503"), ("STANDIN_HANG", "the port is open, but the request is not answered")],
)
def test_an_answer_that_never_comes_right_is_not_waited_for_beyond_the_limit(
    variable: str, seen: str, own: harness.Watchdog
) -> None:
    """a, b: upstream asked for ever, without a pause or without an end."""
    with pytest.raises(harness.NotReady, match=seen):
        Server("m", [], env_dict={variable: "1"}, max_wait_seconds=5.0)
    assert own.servers[0].pids() == []


def test_a_server_that_ends_with_0_is_not_waited_for(own: harness.Watchdog) -> None:
    """c: upstream waited 480 s."""
    with pytest.raises(harness.ServerExited, match="exit code 0") as caught:
        Server("m", [], env_dict={"STANDIN_EXIT_0": "1"}, max_wait_seconds=480.0)
    assert caught.value.returncode == 0
    assert own.servers[0].pids() == []


@pytest.mark.usefixtures("own")
def test_an_answer_of_somebody_else_is_not_the_servers() -> None:
    """d: upstream took any process that answers on the port for its server."""
    with Plain("m", []) as other:

        class Deceived(Server):
            def _start_server(self, model: str, vllm_serve_args: list[str], env_dict: Mapping[str, str] | None) -> None:
                # As vLLM's suite does it: nobody has looked whether the port is taken.
                del env_dict
                self.proc = subprocess.Popen(["/bin/sleep", "600"])
                del model, vllm_serve_args

        with pytest.raises(harness.NotReady, match="a process that is not this server's answers"):
            Deceived("m", ["--port", str(other.port)], auto_port=False, max_wait_seconds=3.0)


@pytest.mark.usefixtures("own")
def test_a_clock_that_is_set_does_not_end_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """e: upstream measured with time.time()."""
    jumps = iter(range(0, 10**12, 10**6))
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))
    with Server("m", [], env_dict={"STANDIN_WARMUP_S": "0.2"}, max_wait_seconds=READY_S) as server:
        assert server.proc.poll() is None


# ---- the ten

_HEAD = f"""
import ctypes, json, os, pathlib, signal, sys, threading, time
import pytest
from harness.vllm import RemoteOpenAIServer

HERE = pathlib.Path(__file__).parent

class Server(RemoteOpenAIServer):
    command = {Server.command!r}

class Plain(RemoteOpenAIServer):
    command = {Plain.command!r}

def tell(name, value):
    (HERE / f"{{name}}.tmp").write_text(json.dumps(value))
    (HERE / f"{{name}}.tmp").rename(HERE / name)

def made_in_threads(count, **options):
    servers = []
    threads = [threading.Thread(target=lambda: servers.append(Server("m", [], **options))) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(servers) == count
    tell("up", [pid for server in servers for pid in server.server.pids()])
    return servers
"""


class Suite:
    """A pytest run of its own. `up` are the processes of its servers, once they are told of."""

    def __init__(self, directory: Path, code: str, *options: str) -> None:
        self.directory = directory
        (directory / "test_it.py").write_text(_HEAD + code, encoding="utf-8")
        environment = {**os.environ, "HARNESS_STATE_DIR": str(directory / "state")}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, "test_it.py"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=directory, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )

    def told(self, name: str) -> list[int]:
        path = self.directory / name
        processes.wait_for(lambda: path.exists() or self.process.poll() is not None, 60, f"{name} is told")
        found: list[int] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def ended(self) -> str:
        said, _ = self.process.communicate(timeout=60)
        return said


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Suite]]:
    """Give a function that starts a run; one that still runs in the end is killed."""
    suites: list[Suite] = []

    def start(code: str, *options: str) -> Suite:
        directory = tmp_path / f"run-{len(suites)}"
        directory.mkdir()
        suites.append(Suite(directory, code, *options))
        return suites[-1]

    yield start
    for suite in suites:
        suite.process.kill()
        suite.process.communicate()


ENDS = {
    "os._exit": "os._exit(0)",
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "a crash": "ctypes.string_at(0)",
    # Until pytest-timeout ends the process.
    "pytest-timeout": "time.sleep(600)",
}


@pytest.mark.parametrize("end", ENDS)
def test_1_no_end_of_pytest_leaves_a_server(end: str, run: Callable[..., Suite]) -> None:
    code = f"""
def test_it():
    made_in_threads(2, env_dict={{"STANDIN_STUBBORN": "1", "STANDIN_DAEMON": "1"}})
    while not (HERE / "go").exists():
        time.sleep(0.01)  # until the processes are watched
    {ENDS[end]}
"""
    options = ["--timeout=10", "--timeout-method=thread"] if end == "pytest-timeout" else []
    suite = run(code, "-o", "harness_crash_grace_s=1", *options)
    people = processes.identities(suite.told("up"))
    assert len(people) >= 6
    (suite.directory / "go").touch()
    suite.ended()
    processes.wait_gone(people, READY_S)


@pytest.mark.parametrize("where", ["in Python", "in C, with the GIL"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT], ids=lambda number: number.name)
def test_2_no_signal_to_pytest_leaves_a_server(number: int, where: str, run: Callable[..., Suite]) -> None:
    hang = "ctypes.PyDLL(None).sleep(600)" if where != "in Python" else "time.sleep(600)"  # until the signal
    suite = run(f"\ndef test_it():\n    made_in_threads(2)\n    {hang}\n")
    people = processes.identities(suite.told("up"))
    suite.process.send_signal(number)
    suite.ended()
    assert suite.process.returncode == -number
    processes.wait_gone(people, READY_S)


def test_3_an_interrupted_shutdown_can_be_done_again(own: harness.Watchdog) -> None:
    """Upstream marked the servers as shut down first, and left them to nobody."""
    servers = [Server("m", [], env_dict={"STANDIN_STOP_S": "5.0"}) for _ in range(2)]

    def interrupt() -> None:
        processes.wait_for(lambda: servers[0].server.state == "asked", READY_S, "the stop has begun")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        Server.shutdown_many(servers)
    thread.join()
    assert [server._shutdown_complete for server in servers] == [False, False]
    Server.shutdown_many(servers)
    assert [server.proc.returncode for server in servers] == [0, 0]
    assert [server.pids() for server in own.servers] == [[], []]


def test_3_an_interrupt_in_teardown_leaves_nothing(run: Callable[..., Suite]) -> None:
    code = """
@pytest.fixture
def servers():
    servers = made_in_threads(2, env_dict={"STANDIN_STOP_S": "1.5"})
    yield servers
    tell("down", [])
    Server.shutdown_many(servers)

def test_it(servers):
    pass
"""
    suite = run(code)
    people = processes.identities(suite.told("up"))
    suite.told("down")
    suite.process.send_signal(signal.SIGINT)
    suite.ended()
    processes.wait_gone(people, READY_S)


@pytest.mark.parametrize("kind", ["Plain", "Function"])
def test_3_an_interrupted_start_leaves_nothing(kind: str, run_script: Callable[..., str]) -> None:
    """At many moments of it: in the launch, between launch and the wait, and in the wait."""
    said = run_script(
        f"""
        import os, signal, sys
        sys.path.insert(0, {str(FOLDER.parent)!r})
        import processes
        from harness import current
        from harness.vllm import RemoteOpenAIServer, RemoteOpenAIServerCustom

        class Plain(RemoteOpenAIServer):
            command = {Plain.command!r}

        def serve(env, model, arguments):
            os.execv(Plain.command[0], [*Plain.command, model, *arguments])

        class Function(RemoteOpenAIServerCustom):
            def __init__(self, model, arguments):
                super().__init__(model, arguments, serve)

        def interrupt(_, frame):
            while frame is not None:  # only in the start: between its return and the next line nobody holds the server
                if frame.f_code is RemoteOpenAIServer.__init__.__code__:
                    raise KeyboardInterrupt
                frame = frame.f_back

        signal.signal(signal.SIGALRM, interrupt)
        {kind}("m", [])._shutdown()
        before = set(processes.tree(os.getpid()))
        interrupted = 0
        for number in range(40):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + number * 0.001)
                server = {kind}("m", [])
                signal.setitimer(signal.ITIMER_REAL, 0)
                server._shutdown()
            except KeyboardInterrupt:
                interrupted += 1
            left = [server for server in current.watchdog().servers if not server.has_ended]
            assert not left, (number, left)
            processes.wait_gone(set(processes.tree(os.getpid())) - before, 10.0)
        print(interrupted > 10)
        """,
        via='"$@" 2>/dev/null',  # where Python says that an interrupt struck in a destructor
    )
    assert said == "True\n"


def test_4_what_a_failed_fixture_has_started_is_stopped_before_the_next_test(run: Callable[..., Suite]) -> None:
    code = """
@pytest.fixture(scope="module")
def servers():
    made_in_threads(2)
    raise RuntimeError("a third did not start")

def test_it(servers):
    pass

def test_next():
    assert not [pid for pid in json.loads((HERE / "up").read_text()) if os.path.exists(f"/proc/{pid}/exe")]
"""
    suite = run(code, "-W", "error")
    said = suite.ended()
    assert "1 passed, 1 error" in said, said
    assert "a third did not start" in said


def test_4_what_a_test_has_started_of_which_one_fails_is_stopped_with_it(run: Callable[..., Suite]) -> None:
    code = """
def test_it():
    made_in_threads(2)
    Server("a third", [], env_dict={"STANDIN_FAIL_RANK": "0"})

def test_next():
    assert not [pid for pid in json.loads((HERE / "up").read_text()) if os.path.exists(f"/proc/{pid}/exe")]
"""
    said = run(code).ended()
    assert "1 failed, 1 passed" in said, said
    assert "The test failed after a server of it did not get ready: what it left was stopped." in said


def test_5_an_emergency_stops_all_at_once(run: Callable[..., Suite]) -> None:
    code = """
def test_it():
    servers = made_in_threads(4, env_dict={"STANDIN_STOP_S": "0.6"})
    tell("roots", [server.proc.pid for server in servers])
    time.sleep(600)  # until it is killed
"""
    suite = run(code)
    roots = processes.identities(suite.told("roots"))
    suite.process.kill()
    ends = []
    left = roots
    while left:
        left = processes.left_after(left[:1], READY_S) + left[1:]
        ends.append(time.monotonic())
        assert len(ends) <= len(roots)
    # One after another the last would end 1.8 s after the first.
    assert ends[-1] - ends[0] < 1.2


def test_6_one_rank_that_fails_ends_the_wait_for_all(own: harness.Watchdog) -> None:
    errors: dict[int, BaseException] = {}

    def start(rank: int) -> None:
        environment = {"STANDIN_503": "1"} if rank else {"STANDIN_FAIL_RANK": "0", "STANDIN_WARMUP_S": "0.3"}
        arguments = ["--data-parallel-size", "3", "--data-parallel-rank", str(rank), "--data-parallel-size-local", "1"]
        try:
            Server("m", arguments, env_dict=environment, max_wait_seconds=480.0)
        except harness.HarnessError as error:
            errors[rank] = error

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(errors[0], harness.ServerExited)
    for rank in (1, 2):
        assert "another rank of its deployment has failed: " in str(errors[rank])
        assert "ended with exit code 3" in str(errors[rank])
    assert [server.pids() for server in own.servers] == [[], [], []]


def test_6_another_deployment_is_no_sibling(own: harness.Watchdog) -> None:
    """Nor is a server that is whole: two may be started side by side, and one of them fail."""
    errors: dict[str, BaseException] = {}
    servers: list[RemoteVLLMServer] = []

    def start(name: str, more: list[str], environment: dict[str, str]) -> None:
        try:
            servers.append(Server(name, ["--data-parallel-size", "1", *more], env_dict=environment))
        except harness.HarnessError as error:
            errors[name] = error

    ports = [own.launch(["sleep", "600"]).port for _ in range(2)]  # held for this test
    slow, failing = {"STANDIN_WARMUP_S": "1.0"}, {"STANDIN_FAIL_RANK": "0"}
    starts = [
        ("whole", [], slow),
        ("whole, too", [], failing),
        ("of one", ["--data-parallel-rpc-port", str(ports[0])], slow),
        ("of another", ["--data-parallel-rpc-port", str(ports[1])], failing),
    ]
    threads = [threading.Thread(target=start, args=each) for each in starts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    Server.shutdown_many(servers)
    assert set(errors) == {"whole, too", "of another"}


def test_7_parallel_workers_do_not_meet(run: Callable[..., Suite]) -> None:
    code = """
@pytest.mark.parametrize("number", range(4))
def test_it(number):
    servers = made_in_threads(2)
    for server in servers:
        with server.get_client() as client:
            assert [model.id for model in client.models.list()] == ["m"]
    Server.shutdown_many(servers)
"""
    said = run(code, "-n", "2", "-W", "error").ended()
    assert "4 passed" in said, said


@pytest.fixture
def gpu_watchdog(standin: Standin) -> Iterator[harness.Watchdog]:
    """Give a watchdog that sees the stand-in's GPUs, and have drop-ins use it."""
    watchdog = harness.Watchdog(state_dir=standin.state_dir, gpu_release_s=1.0).start()

    def source() -> harness.Watchdog:
        return watchdog

    current.use(source)
    yield watchdog
    current.use_no_more(source)
    watchdog.close()


class Holder(RemoteVLLMServer):
    """A server that holds memory on the devices that it sees."""

    def _start_server(self, model: str, vllm_serve_args: list[str], env_dict: Mapping[str, str] | None) -> None:
        command = [part.replace("{port}", str(self.port)) for part in Machine.server("--mib", "9000")]
        self._launch(command, env_dict, name=model)
        del vllm_serve_args


def test_8_its_own_devices_are_watched_and_its_environment_is_left(
    standin: Standin, gpu_watchdog: harness.Watchdog
) -> None:
    """Upstream measured the first devices of the machine, whatever the server's environment said."""
    first, second = standin.uuids
    with Holder("one", [], env_dict={"CUDA_VISIBLE_DEVICES": second}) as server:
        assert server.server.gpus == (second,)
        assert Machine.environment_of(server.proc.pid)["CUDA_VISIBLE_DEVICES"] == second
        assert "CUDA_DEVICE_ORDER" not in Machine.environment_of(server.proc.pid)
        # Two on one device, and a neighbour who comes meanwhile and stays: upstream waited 120 s for both.
        sibling = Holder("two", [], env_dict={"CUDA_VISIBLE_DEVICES": second})
        with standin.stranger(first, 30000) as stranger:
            server._shutdown()
            stranger.kill()
        assert sibling.proc.poll() is None
        sibling._shutdown()
    for outcome in (server.server.outcome, sibling.server.outcome):
        assert outcome is not None
        assert [(device.uuid, device.verdict) for device in outcome.gpu] == [(second, "freed")]
    del gpu_watchdog


def test_8_memory_that_stays_is_an_error_and_the_next_server_does_not_start(
    standin: Standin, gpu_watchdog: harness.Watchdog
) -> None:
    first, _ = standin.uuids
    server = Holder("one", [], env_dict={"CUDA_VISIBLE_DEVICES": first})
    standin.set_residue(first, 9000)
    with pytest.raises(RuntimeError, match=f"{first}.*held") as caught:
        server._shutdown()
    assert isinstance(caught.value, harness.GpuNotReleased)
    with pytest.raises(harness.GpuUnavailable, match="is quarantined"):
        Holder("two", [], env_dict={"CUDA_VISIBLE_DEVICES": first})
    standin.set_residue(first, 0)
    assert len(gpu_watchdog.servers) == 1


def test_8_devices_that_are_hidden_are_not_watched(standin: Standin, gpu_watchdog: harness.Watchdog) -> None:
    with Holder("one", [], env_dict={"CUDA_VISIBLE_DEVICES": ""}) as server:
        assert server.server.gpus == ()
    del standin, gpu_watchdog


@pytest.mark.parametrize("named", ["0", None, "its own UUID"])
def test_8_a_device_that_this_process_has_leased_is_not_waited_for(
    named: str | None, standin: Standin, gpu_watchdog: harness.Watchdog
) -> None:
    with gpu_watchdog.group(gpus=1) as group:
        (leased,) = group.lease_gpus()
        assert gpu_watchdog.leased == {leased}
        environment = {} if named is None else {"CUDA_VISIBLE_DEVICES": leased if len(named) > 1 else named}
        with Holder("one", [], env_dict=environment) as server:
            assert server.server.gpus == ()
        other = next(uuid for uuid in standin.uuids if uuid != leased)
        with Holder("two", [], env_dict={"CUDA_VISIBLE_DEVICES": other}) as server:
            assert server.server.gpus == (other,)
            assert gpu_watchdog.leased == {leased}
    with Holder("three", [], gpus=1) as server:
        assert gpu_watchdog.leased == set(server.server.gpus)
    assert gpu_watchdog.leased == set()


def test_8_memory_that_cannot_be_read_keeps_nobody_from_starting(
    standin: Standin, gpu_watchdog: harness.Watchdog
) -> None:
    standin.fail("nvmlDeviceGetMemoryInfo_v2", 3)  # NVML_ERROR_NOT_SUPPORTED
    with Holder("one", [], env_dict={"CUDA_VISIBLE_DEVICES": standin.uuids[0]}) as server:
        assert server.server.gpus == ()
    del gpu_watchdog


def test_8_ranks_do_not_wait_for_who_waits_for_them(standin: Standin, gpu_watchdog: harness.Watchdog) -> None:
    first, second = standin.uuids
    rank0 = Holder("rank0", [], env_dict={"CUDA_VISIBLE_DEVICES": first})
    with harness.Watchdog(state_dir=standin.state_dir) as other:
        whole = threading.Thread(target=lambda: other.launch(["sleep", "600"], gpus=2).stop())
        whole.start()
        processes.wait_for(lambda: bool(Machine.book(standin.state_dir)["waiters"]), READY_S, "somebody waits")
        rank1 = Holder("rank1", [], env_dict={"CUDA_VISIBLE_DEVICES": second})
        assert whole.is_alive()
        assert (rank0.server.gpus, rank1.server.gpus) == ((first,), (second,))
        Holder.shutdown_many([rank0, rank1])
        whole.join()
    del gpu_watchdog


def test_8_telemetry_that_cannot_be_had_keeps_nobody_from_starting(
    standin: Standin, gpu_watchdog: harness.Watchdog
) -> None:
    standin.fail("nvmlInitWithFlags", 18)  # NVML_ERROR_LIB_RM_VERSION_MISMATCH
    with Holder("one", [], env_dict={"CUDA_VISIBLE_DEVICES": standin.uuids[0]}) as server:
        assert server.server.gpus == ()
    with pytest.raises(harness.GpuUnavailable):
        Holder("two", [], gpus=1)
    assert len(gpu_watchdog.servers) == 1


def test_8_a_lease_is_had_by_asking_for_it(standin: Standin, gpu_watchdog: harness.Watchdog) -> None:
    with Holder("one", [], gpus=1) as server:
        (uuid,) = server.server.gpus
        assert Machine.environment_of(server.proc.pid)["CUDA_VISIBLE_DEVICES"] == uuid
        assert uuid in standin.uuids
    del gpu_watchdog


def test_9_a_start_that_fails_says_why(own: harness.Watchdog) -> None:
    """Upstream said that the server exited unexpectedly, and no more."""
    with pytest.raises(RuntimeError, match="exit code 3") as caught:
        Server("m", [], env_dict={"STANDIN_FAIL_RANK": "0"})
    assert isinstance(caught.value, harness.ServerExited)
    assert "Traceback" in caught.value.log_tail
    assert own.servers[0].pids() == []


def test_10_what_leaves_its_session_is_found(own: harness.Watchdog) -> None:
    with Server("m", [], env_dict={"STANDIN_DAEMON": "1"}) as server:
        people = processes.identities(server.server.pids())
        sessions = {os.getsid(who.pid) for who in people}
        assert len(sessions) > 1
    assert not [who for who in people if processes.is_running(who)]
    del own


def test_10_a_forked_child_has_servers_of_its_own_and_ends_no_others(run: Callable[..., Suite]) -> None:
    """As vLLM's fork_new_process_for_each_test: the child leaves by os._exit, or is ended by a signal."""
    code = """
@pytest.mark.parametrize("is_ended", [False, True])
def test_it(is_ended):
    server = Plain("m", [])
    child = os.fork()
    if not child:
        own = Plain("m", [])
        tell("child", own.server.pids())
        if is_ended:
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    os.waitpid(child, 0)
    assert server.proc.poll() is None
    Server.shutdown_many([server])
    for pid in json.loads((HERE / "child").read_text()):
        while os.path.exists(f"/proc/{pid}/exe"):
            time.sleep(0.01)  # its own watchdog ends it, of which this process is not told
"""
    said = run(code).ended()
    assert "2 passed" in said, said


def test_a_deadline_reaches_a_run_whose_first_server_was_made_by_a_thread(run: Callable[..., Suite]) -> None:
    code = """
def test_first():
    Server.shutdown_many(made_in_threads(1))

@pytest.mark.harness_deadline(1)
def test_hangs():
    time.sleep(600)  # until the deadline

def test_next():
    pass
"""
    said = run(code).ended()
    assert "1 failed, 2 passed" in said, said
    assert "this test hangs" in said
