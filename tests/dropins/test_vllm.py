"""The drop-in for vLLM's suite: its constructor, attributes, clients and hooks, on a server like vLLM's."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import processes
import pytest
from dropins.serving import Plain, Server, program
from servers.commands import FOLDER, READY_S

import harness
from harness import current, vllm
from harness.vllm import RemoteOpenAIServer, RemoteOpenAIServerCustom, RemoteVLLMServer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

pytestmark = pytest.mark.usefixtures("own")


def status_of(url: str) -> int:
    status: int = urllib.request.urlopen(url).status  # noqa: S310 - a server of this test
    return status


def environment_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")


def arguments_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]


# ---- what is there


def test_a_server_is_ready_once_it_is_made_and_gone_once_it_is_left(own: harness.Watchdog) -> None:
    with Server("org/a-model", []) as server:
        assert isinstance(server, RemoteVLLMServer)
        assert (server.host, server.uds, server.show_hidden_metrics) == ("127.0.0.1", None, False)
        assert server.url_root == f"http://127.0.0.1:{server.port}"
        assert server.url_for("health") == f"{server.url_root}/health"
        assert server.url_for("/v1/", "models") == f"{server.url_root}/v1/models"
        assert server.DUMMY_API_KEY == "token-abc123"
        assert status_of(server.url_for("health")) == 200
        assert own.servers == (server.server,)
        assert server.server.port == server.port
        assert server.proc.poll() is None
        assert os.getpgid(server.proc.pid) == os.getsid(server.proc.pid) == server.proc.pid
        people = processes.identities(server.server.pids())
        assert len(people) >= 3  # an API server, an engine, a worker
    assert not [who for who in people if processes.is_running(who)]
    assert (server.proc.returncode, server.server.outcome and server.server.outcome.how) == (0, "asked")
    assert server._shutdown_complete


def test_the_command_line_is_vllms() -> None:
    with Server("a", ["--dtype", "half"], seed=7, override_hf_configs={"a": {"b": [1]}}) as server:
        found = arguments_of(server.proc.pid)
        assert found[found.index("serve") :] == [
            *("serve", "a", "--dtype", "half", "--port", str(server.port), "--seed", "7"),
            *("--hf-overrides", json.dumps({"a": {"b": [1]}})),
        ]
    assert RemoteOpenAIServer.command == ("vllm", "serve")
    assert vllm.RemoteLaunchRenderServer.command == ("vllm", "launch", "render")


def test_nothing_in_arguments_and_environment_is_replaced() -> None:
    template = "{% for message in messages %}{{name}} {port} {host}{% endfor %}"
    with Server("m", ["--chat-template", template], env_dict={"TEMPLATE": "{name} {port}"}) as server:
        assert template in arguments_of(server.proc.pid)
        assert "TEMPLATE={name} {port}" in environment_of(server.proc.pid)


def test_the_environment_is_this_process_with_env_dict_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_TEST", "1")
    with Server("m", []) as one, Server("m", [], env_dict={"VLLM_WORKER_MULTIPROC_METHOD": "fork", "MORE": "2"}) as two:
        assert {"OF_THE_TEST=1", "VLLM_WORKER_MULTIPROC_METHOD=spawn"} <= set(environment_of(one.proc.pid))
        assert {"OF_THE_TEST=1", "VLLM_WORKER_MULTIPROC_METHOD=fork", "MORE=2"} <= set(environment_of(two.proc.pid))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "8000"], "manually specified the port when `auto_port=True`"),
        (["--port=8000"], "manually specified the port"),
        (["-p", "8000"], "manually specified the port"),
        (["--seed", "1"], "manually specified the seed when `seed=0`"),
    ],
)
def test_what_is_said_twice_is_a_value_error(arguments: list[str], message: str, own: harness.Watchdog) -> None:
    with pytest.raises(ValueError, match=message):
        Server("m", arguments)
    assert own.servers == ()


def test_other_wrong_arguments_are_refused_at_once(own: harness.Watchdog) -> None:
    bad: list[tuple[Callable[[], object], str]] = [
        (lambda: Server("m", ["--port", "x"], auto_port=False), "invalid int value"),
        (lambda: Server("m", ["--port", "70000"], auto_port=False), "must be from 1 to 65535, not 70000"),
        (lambda: RemoteOpenAIServerCustom("nul\0", [], serve), "a name holds a NUL byte"),
        (lambda: Server("m", [], max_wait_seconds=-1), "max_wait_seconds must be more than 0"),
        (lambda: Server("m", [], env_dict={"A": 1}), "the value of 'A' in env must be a string"),  # type: ignore[dict-item]
        (lambda: Server("m", [3]), "argument 1 of the server must be a string"),  # type: ignore[list-item]
        (lambda: Server("m", [], gpus=1, env_dict={"CUDA_VISIBLE_DEVICES": "0"}), "must not set CUDA_VISIBLE"),
    ]
    for make, message in bad:
        with pytest.raises(harness.SpecError, match=message):
            make()
    assert own.servers == ()


def test_a_program_that_is_not_there_is_said_at_once() -> None:
    class Absent(RemoteOpenAIServer):
        command: ClassVar[Sequence[str]] = ["no-such-vllm", "serve"]

    with pytest.raises(harness.LaunchFailed, match="no-such-vllm"):
        Absent("m", [])


def test_a_socket_file(tmp_path: Path) -> None:
    path = tmp_path / "it.sock"
    with Server("m", ["--uds", str(path)]) as server:
        assert (server.uds, server.host, server.port) == (str(path), None, None)
        assert server.url_root == "http://it.sock"
        assert "--port" not in arguments_of(server.proc.pid)
        with server.get_client() as client:
            assert [model.id for model in client.models.list()] == ["m"]


def test_somebody_elses_socket_file_is_not_taken_for_the_server(tmp_path: Path) -> None:
    path = tmp_path / "it.sock"
    with (
        Server("m", ["--uds", str(path)]),
        pytest.raises(harness.NotReady, match="a process that is not this server's"),
    ):
        Plain("m", ["--uds", str(path)], max_wait_seconds=3.0)


def test_the_clients() -> None:
    with Server("m", []) as server:
        with server.get_client() as client:
            assert (client.max_retries, client.timeout, client.api_key) == (0, 600, "token-abc123")
            assert str(client.base_url) == f"{server.url_root}/v1/"
            answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hello"}])
            assert answer.choices[0].message.content
            assert client.completions.create(model="m", prompt="hello").choices[0].text
        with server.get_client(timeout=3, max_retries=2) as client:
            assert (client.max_retries, client.timeout) == (2, 3)
        asyncio.run(_list_models(server))
        with server.get_client_anthropic() as anthropic:
            assert (str(anthropic.base_url).rstrip("/"), anthropic.max_retries) == (server.url_root, 0)
        assert server.get_async_client_anthropic(timeout=1).timeout == 1


async def _list_models(server: RemoteOpenAIServer) -> None:
    async with server.get_async_client() as client:
        assert [model.id async for model in client.models.list()] == ["m"]


def test_a_client_whose_library_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with Server("m", []) as server, pytest.raises(harness.HarnessError, match=r"pip install .*\[openai\]"):
        server.get_client()


def test_the_process_is_popens() -> None:
    with Server("m", []) as server:
        with pytest.raises(subprocess.TimeoutExpired):
            server.proc.wait(timeout=0.05)
        server.proc.send_signal(signal.SIGTERM)
        assert server.proc.wait(READY_S) == server.proc.poll() == server.proc.returncode == 0


# ---- ending it


@pytest.mark.parametrize(
    ("arguments", "grace_s"),
    [([], 15.0), (["--shutdown-timeout", "30"], 45.0), (["--shutdown_timeout=2.5"], 17.5)],
)
def test_the_grace_comes_from_vllms_own_timeout(arguments: list[str], grace_s: float) -> None:
    with Server("m", arguments) as server:
        assert server._get_process_termination_timeout() == server.server.grace_s == grace_s


def test_rocm_engines_have_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.remote_server.IS_ROCM", True)
    with Server("m", []) as one, Server("m", ["--shutdown-timeout", "30"]) as two:
        assert (one.server.grace_s, two.server.grace_s) == (30.0, 45.0)


def test_only_the_root_is_asked(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    with Server("m", ["--tensor-parallel-size", "2"], env_dict={"STANDIN_BROKEN": str(broken)}):
        pass
    assert not broken.exists()


def test_shutdown_many_takes_what_there_is() -> None:
    RemoteOpenAIServer.shutdown_many([])
    RemoteOpenAIServer.shutdown_many([None, None])
    servers: list[RemoteVLLMServer | None] = [None]
    with ExitStack() as stack:
        stack.callback(Server.shutdown_many, servers)
        servers.append(Server("m", []))
        servers.append(Server("m", []))
    assert [server._shutdown_complete for server in servers if server is not None] == [True, True]
    RemoteOpenAIServer.shutdown_many(servers)


def test_a_list_may_grow_while_it_is_shut_down() -> None:
    servers: list[RemoteVLLMServer] = []

    class Late(Plain):
        def _terminate_process_tree(self) -> None:
            if len(servers) == 1:
                servers.append(Plain("m", []))
            super()._terminate_process_tree()

    servers.append(Late("m", []))
    Server.shutdown_many(servers)
    assert [server._shutdown_complete for server in servers] == [True, False]
    Server.shutdown_many(servers)
    assert servers[1]._shutdown_complete


def test_many_are_stopped_in_the_time_of_the_slowest() -> None:
    slow = {"STANDIN_STOP_S": "2.0"}
    servers = [Server("m", [], env_dict=slow) for _ in range(4)]
    Server.shutdown_many(servers)
    outcomes = [server.server.outcome for server in servers]
    exits = [outcome.exited_at for outcome in outcomes if outcome is not None and outcome.exited_at is not None]
    assert [outcome.how for outcome in outcomes if outcome is not None] == ["asked"] * 4
    # One after another the last would exit 6 s after the first.
    assert max(exits) - min(exits) < 2.0


# ---- hooks


def test_a_subclass_may_start_a_process_of_its_own() -> None:
    class Own(Server):
        def _start_server(self, model: str, vllm_serve_args: list[str], env_dict: Mapping[str, str] | None) -> None:
            environment = {**os.environ, **(env_dict or {})}
            command = [*self.command, model, *vllm_serve_args]
            self.proc = subprocess.Popen(command, env=environment, start_new_session=True)

    with Own("m", []) as server:
        assert isinstance(server.proc, subprocess.Popen)
        people = processes.identities([server.proc.pid, *processes.tree(server.proc.pid)])
        assert len(people) >= 3
        assert status_of(server.url_for("health")) == 200
    assert server.proc.returncode == 0
    assert not [who for who in people if processes.is_running(who)]


def test_the_exit_of_a_process_of_its_own_is_told_with_its_code() -> None:
    class Own(Server):
        def _start_server(self, model: str, vllm_serve_args: list[str], env_dict: Mapping[str, str] | None) -> None:
            del model, vllm_serve_args, env_dict
            self.proc = subprocess.Popen(["/bin/sh", "-c", "sleep 0.1; exit 7"])  # so that it is adopted first

    with pytest.raises(harness.ServerExited, match="exit code 7") as caught:
        Own("m", [])
    assert caught.value.returncode == 7


def test_every_hook_is_called() -> None:
    called: list[str] = []

    class Hooked(Plain):
        def _pre_download_model(self, model: str, args: Any) -> None:
            called.append(f"download {model} {args.port == self.port}")

        def _get_gpu_memory_used(self) -> float | None:
            called.append("memory")
            return 1e9

        def _poll(self) -> int | None:
            return super()._poll()

        def _terminate_process_tree(self) -> None:
            called.append("terminate")
            super()._terminate_process_tree()

        def _wait_for_gpu_memory_release(self, timeout: float = 1.0, log_interval: float = 1.0) -> None:
            called.append("release")
            super()._wait_for_gpu_memory_release(timeout, log_interval)

    with Hooked("m", []):
        called.append("up")
    assert called == ["download m True", "memory", "up", "terminate", "release", "memory"]


def test_a_poll_that_knows_more_ends_the_wait() -> None:
    class Knowing(Server):
        def _poll(self) -> int | None:
            return 9

    with pytest.raises(harness.NotReady, match="has ended with exit code 9"):
        Knowing("m", [], env_dict={"STANDIN_503": "1"})


def test_what_hooks_raise_comes_out_after_all_has_been_stopped() -> None:
    class Broken(Plain):
        def _terminate_process_tree(self) -> None:
            super()._terminate_process_tree()
            raise KeyError("the first")

        def _wait_for_gpu_memory_release(self, timeout: float = 1.0, log_interval: float = 1.0) -> None:
            del timeout, log_interval
            raise RuntimeError("the second")

    servers = [Broken("m", []), Plain("m", [])]
    with pytest.raises(harness.HarnessError, match=r"(?s)the first.*the second"):
        Server.shutdown_many(servers)
    assert [server._shutdown_complete for server in servers] == [True, True]


@pytest.mark.parametrize("used", [9e9, None])
def test_telemetry_of_the_users_own_that_fails_is_no_release(
    used: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings: list[float | None] = [1e9]

    class Metered(Plain):
        def _get_gpu_memory_used(self) -> float | None:
            return readings[0]

    monkeypatch.setattr("harness.remote_server._RELEASE_S", 0.2)
    server = Metered("m", [])
    readings[0] = used
    with pytest.raises(harness.GpuNotReleased, match="GPU memory did not release within"):
        server.__exit__(None, None, None)
    assert server._shutdown_complete
    readings[0] = 1e9
    server._shutdown()


# ---- a function as a server


def serve(env_dict: Mapping[str, str] | None, model: str, arguments: list[str]) -> None:
    """Be the server, in a child that was forked from the test."""
    os.environ.update(env_dict or {})
    command = [*program("vllm_serve.py"), "serve", model, *arguments]
    os.execv(command[0], command)  # noqa: S606 - as vLLM's own children do, by another way


def test_a_function_is_a_server_in_a_child_of_the_test() -> None:
    with RemoteOpenAIServerCustom("m", [], serve, env_dict={"STANDIN_WARMUP_S": "0.1"}) as server:
        assert server.proc.is_alive()
        assert os.getsid(server.proc.pid or 0) == server.proc.pid
        assert status_of(server.url_for("health")) == 200
        people = processes.identities([server.proc.pid or 0, *processes.tree(server.proc.pid or 0)])
        assert len(people) >= 3
    assert server.proc.exitcode == 0
    assert not [who for who in people if processes.is_running(who)]


def test_a_function_sees_what_the_test_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "serve", lambda *_: os._exit(5))
    with pytest.raises(harness.ServerExited, match="exit code 5") as caught:
        RemoteOpenAIServerCustom("m", [], serve)
    assert caught.value.returncode == 5


def test_a_subclass_of_a_function_may_start_a_process_of_its_own() -> None:
    class Own(RemoteOpenAIServerCustom):
        def _start_server(self, model: str, vllm_serve_args: list[str], env_dict: Mapping[str, str] | None) -> None:
            arguments = (env_dict, model, vllm_serve_args)
            self.proc = multiprocessing.get_context("fork").Process(target=serve, args=arguments)
            self.proc.start()

    with Own("m", [], serve) as server:
        assert status_of(server.url_for("health")) == 200
    assert server.proc.exitcode == 0


def test_servers_of_every_kind_are_shut_down_together() -> None:
    servers = [RemoteOpenAIServerCustom("m", [], serve), Server("m", []), Plain("m", [])]
    Server.shutdown_many(servers)
    assert all(server._shutdown_complete for server in servers)


def test_a_function_leads_a_group_of_its_own_when_it_is_owned() -> None:
    for _ in range(5):
        with RemoteOpenAIServerCustom("m", [], serve) as server:
            assert server.server.pgid == server.proc.pid != os.getpgrp()


@pytest.mark.parametrize("kind", ["function", "Popen"])
def test_a_process_that_a_dead_watchdog_cannot_own_is_ended(kind: str, run_script: Callable[..., str]) -> None:
    """And pytest can end: multiprocessing waits for its children at exit."""
    said = run_script(
        f"""
        import os, signal, subprocess, sys
        sys.path.insert(0, {str(FOLDER.parent)!r})
        import harness, processes
        from harness import current
        from harness.vllm import RemoteOpenAIServer, RemoteOpenAIServerCustom

        class Own(RemoteOpenAIServer):
            def _start_server(self, model, arguments, env_dict):
                self.proc = subprocess.Popen(["sleep", "600"])

        watchdog = current.watchdog()
        current.use(lambda: watchdog)
        os.kill(watchdog.pid, signal.SIGKILL)
        processes.wait_gone([watchdog.pid], 10)
        try:
            RemoteOpenAIServerCustom("m", [], lambda *_: None) if {kind == "function"} else Own("m", [])
        except harness.HarnessError as error:
            print(type(error).__name__)
        print([processes.name(pid) for pid in set(processes.tree(os.getpid())) - set(processes.zombies(os.getpid()))])
        """,
        via='"$@" 2>/dev/null || true',  # in the end it says that the watchdog had died
    )
    assert said == "WatchdogDied\n[]\n"


def test_a_server_that_the_end_of_the_watchdog_has_ended_is_shut_down(tmp_path: Path) -> None:
    with harness.Watchdog(state_dir=tmp_path / "other") as watchdog:

        def source() -> harness.Watchdog:
            return watchdog

        current.use(source)
        server = Plain("m", [])
        current.use_no_more(source)
    server._shutdown()
    Server.shutdown_many([server])
    assert server.server.pids() == []


KEY = "kept-from-everybody"
SHOWN = """
import os
import pytest
from harness.vllm import RemoteOpenAIServer, RemoteOpenAIServerCustom

class Absent(RemoteOpenAIServer):
    command = ["no-such-vllm"]

ARGUMENTS = ["--api-key", "-".join(["kept", "from", "everybody"])]

def test_absent():
    Absent("m", ARGUMENTS)

def test_wrong():
    Absent("m", [*ARGUMENTS, "--port", "x"], auto_port=False)

def test_fork(monkeypatch):
    def fork():
        raise BlockingIOError("no more processes")
    monkeypatch.setattr(os, "fork", fork)
    RemoteOpenAIServerCustom("m", [], print, env_dict={"TOKEN": ARGUMENTS[1]})
"""


@pytest.mark.parametrize("options", [[], ["-l"]])
def test_no_key_is_shown(options: list[str], pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SHOWN)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *options)
    result.assert_outcomes(failed=3)
    assert KEY not in result.stdout.str() + result.stderr.str()


def test_a_child_whose_parent_dies_before_it_is_owned_serves_nobody(
    tmp_path: Path, run_script: Callable[..., str]
) -> None:
    said = run_script(
        f"""
        import os, signal, subprocess, sys
        code = '''
        import os, signal
        from harness import vllm
        def adopt(self, name):
            print(self.proc.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        vllm.RemoteOpenAIServerCustom._adopt = adopt
        def serve(*_):
            open({str(tmp_path / "served")!r}, "w")
        vllm.RemoteOpenAIServerCustom("m", [], serve)
        '''
        import textwrap
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
        print(done.returncode, done.stdout)
        """
    )
    code, pid = said.split()
    assert code == "-9"
    processes.wait_gone([int(pid)], READY_S)
    assert not (tmp_path / "served").exists()


# ---- places


def test_a_fixed_port_that_is_taken_is_said_at_once(own: harness.Watchdog) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:
        port = other.server_address[1]
        with pytest.raises(harness.LaunchFailed, match=rf"port {port}: .*pid {os.getpid()} .* listens on port {port}"):
            Server("m", ["--port", str(port)], auto_port=False)
    assert own.servers == ()


def test_two_hosts_have_the_same_port(own: harness.Watchdog) -> None:
    port = str(own.launch(["sleep", "600"]).port)  # held for this test
    with (
        Plain("m", ["--host", "127.0.0.2", "--port", port], auto_port=False) as one,
        Plain("m", ["--host", "127.0.0.3", "--port", port], auto_port=False) as two,
    ):
        assert one.port == two.port == one.server.port
        assert status_of(one.url_for("health")) == status_of(two.url_for("health")) == 200


def test_all_addresses() -> None:
    with Server("m", ["--host", "0.0.0.0"]) as server:  # noqa: S104 - that is what is tested
        assert server.url_root == f"http://0.0.0.0:{server.port}"
        assert status_of(server.url_for("health")) == 200


def test_a_headless_server_is_ready_when_its_head_is(own: harness.Watchdog) -> None:
    port = own.launch(["sleep", "600"]).port  # held for this test
    rpc = own.launch(["sleep", "600"]).port
    shared = ["--data-parallel-size", "2", "--data-parallel-size-local", "1", "--port", str(port)]
    shared += ["--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(rpc)]
    nodes: list[RemoteVLLMServer] = []

    def start(more: list[str]) -> None:
        nodes.append(Server("m", [*shared, *more], auto_port=False))

    threads = [
        threading.Thread(target=start, args=(more,)) for more in ([], ["--headless", "--data-parallel-start-rank", "1"])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(node.port or 0 for node in nodes) == [port, port]
    Server.shutdown_many(nodes)
    assert [node.proc.returncode for node in nodes] == [0, 0]


def test_a_headless_server_does_not_take_a_strangers_health_for_its_heads() -> None:
    with _answering() as port, pytest.raises(harness.NotReady, match="a process that is not this server's answers"):
        Plain("m", ["--headless", "--port", str(port)], auto_port=False, max_wait_seconds=3.0)


class _Fine(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class _answering:  # noqa: N801 - it is used as a function
    def __enter__(self) -> int:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Fine)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        port: int = self._server.server_address[1]
        return port

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
