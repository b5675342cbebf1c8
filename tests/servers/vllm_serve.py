"""A stand-in for `vllm serve`: its command line, processes, data-parallel registration and shutdown, and no model.

The root answers on the port, or starts `--api-server-count` processes that do. It starts an engine for each local rank,
and each engine its workers. Where other nodes have ranks too, every engine registers with the head, over TCP at
`--data-parallel-address` and `--data-parallel-rpc-port`; until all have, none is ready, and nobody listens on the port.

As of vLLM, only the root may be asked to end: it tells its engines over pipes. Of any other process that gets SIGTERM a
line is written to the file STANDIN_BROKEN. A root that is killed leaves its engines running.

Environment: STANDIN_WARMUP_S (an engine's start takes so long), STANDIN_STOP_S (so does the end of the root),
STANDIN_STUBBORN (workers neither end nor heed SIGTERM), STANDIN_FAIL_RANK (the engine of this rank fails, and its root
ends with 3), STANDIN_EXIT_0 (the root ends with 0 at once), STANDIN_HANG and STANDIN_503 (the root listens from the
start, and answers nothing or 503, for ever), STANDIN_DAEMON (engines have a daemon in a session of its own).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import socket
import socketserver
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# With `python -S` nothing of the environment runs in each of these many processes; the one library is found anyway.
_ENVIRONMENT = os.path.dirname(os.path.dirname(sys.executable))
sys.path.append(f"{_ENVIRONMENT}/lib/python3.{sys.version_info[1]}/site-packages")
try:
    from setproctitle import setproctitle as set_title
except ImportError:

    def set_title(title: str) -> None:
        """Set the name alone; the command line stays as it is."""
        import ctypes  # noqa: PLC0415 - it is slow, and mostly not needed

        ctypes.CDLL(None).prctl(15, title.encode()[:15], 0, 0, 0)  # PR_SET_NAME


_READY, _END, _GO = b"r", b"e", b"g"
_POLL_S = 0.01
_FAILED = 3


def knob(name: str) -> str:
    return os.environ.get(f"STANDIN_{name}", "")


def seconds(name: str) -> float:
    return float(knob(name) or 0.0)


def say(text: str) -> None:
    """Write a whole line; lines of several processes do not mix."""
    os.write(2, f"{text}\n".encode())


# ---- the command line

_FLAGS = ["--headless", "--enforce-eager", "--enable-expert-parallel", "--data-parallel-hybrid-lb"]
_NUMBERS = {"--port": 8000, "--api-server-count": 1, "--data-parallel-size": 1, "--tensor-parallel-size": 1}
_NUMBERS |= {"--data-parallel-rpc-port": 29550, "--data-parallel-start-rank": 0, "--max-model-len": 0}
_NUMBERS |= {"--max-num-seqs": 0, "--seed": 0}
_TEXTS = ["--host", "--uds", "--api-key", "--dtype", "--hf-overrides", "--chat-template", "--served-model-name"]
_TEXTS += ["--gpu-memory-utilization", "--load-format", "--show-hidden-metrics-for-version"]


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vllm", allow_abbrev=False)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    for flag in _FLAGS:
        parser.add_argument(flag, action="store_true")
    for number, default in _NUMBERS.items():
        parser.add_argument(number, type=int, default=default)
    for text in _TEXTS:
        parser.add_argument(text)
    parser.add_argument("--shutdown-timeout", type=float, default=0.0)
    parser.add_argument("--data-parallel-address", default="127.0.0.1")
    parser.add_argument("--data-parallel-rank", type=int)
    parser.add_argument("--data-parallel-size-local", type=int)
    options = parser.parse_args([_normal(argument) for argument in sys.argv[1:]])
    is_external = options.data_parallel_rank is not None
    options.first = options.data_parallel_rank if is_external else options.data_parallel_start_rank
    if options.data_parallel_size_local is None:
        options.data_parallel_size_local = 1 if is_external else options.data_parallel_size
    options.has_other_nodes = options.headless or options.data_parallel_size > options.data_parallel_size_local
    options.is_head = options.has_other_nodes and options.first == 0 and not options.headless
    return options


def _normal(argument: str) -> str:
    # vLLM takes --shutdown_timeout for --shutdown-timeout.
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


# ---- processes and what they are told


class Family:
    """The processes that one has started, each told by a pipe of its own when to end."""

    def __init__(self) -> None:
        """Begin with none."""
        self._names: dict[int, str] = {}
        self._pipes: dict[int, int] = {}

    def start(self, name: str, live: Callable[[Orders], object]) -> None:
        """Fork a process that lives so, and is not to be asked by a signal."""
        read_end, write_end = os.pipe()
        # Until it has a handler of its own, a signal to it would count as one to its parent.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        pid = os.fork()
        if pid == 0:
            os.close(write_end)
            self.let_go()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, partial(_broken, name))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            set_title(name)
            _live(partial(live, Orders(read_end)))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        os.close(read_end)
        self._names[pid], self._pipes[pid] = name, write_end

    def let_go(self) -> None:
        """Close the pipes: a pipe has an end of file only when no other process holds it."""
        for pipe in self._pipes.values():
            os.close(pipe)
        self._pipes = {}

    def tell(self, order: bytes) -> None:
        for pipe in self._pipes.values():
            with contextlib.suppress(BrokenPipeError):  # it has ended by itself
                os.write(pipe, order)

    def end(self) -> None:
        """Tell all to end, and wait until they have."""
        self.tell(_END)
        for pid in self._pipes:
            with contextlib.suppress(ChildProcessError):  # `ended` has seen it
                os.waitpid(pid, 0)

    def ended(self) -> tuple[str, int] | None:
        """Give the name and the exit code of one that has ended by itself."""
        pid, status = os.waitpid(-1, os.WNOHANG) if self._names else (0, 0)
        return (self._names[pid], os.waitstatus_to_exitcode(status)) if pid else None


def _live(live: Callable[[], object]) -> NoReturn:
    try:
        live()
    except BaseException:  # noqa: BLE001 - it must not go on as its parent
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def _broken(name: str, _number: int, _frame: object) -> NoReturn:
    line = f"BROKEN SHUTDOWN: {name} was asked"
    say(line)
    if path := knob("BROKEN"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")
    os._exit(1)


class Orders:
    """What a process is told by its parent; if that has died, it is told nothing more, and lives on."""

    def __init__(self, pipe: int) -> None:
        """Read from a pipe."""
        self._pipes = [pipe]

    def wait(self, timeout_s: float | None = None, *others: socket.socket) -> bytes:
        """Give the next order; b"" if there is none in time, or one of the `others` can be read."""
        sources: list[Any] = [*self._pipes, *others]
        ready, _, _ = select.select(sources, [], [], timeout_s)
        if not self._pipes or self._pipes[0] not in ready:
            return b""
        order = os.read(self._pipes[0], 1)
        if not order:
            self._pipes = []
        return order

    def let_go(self) -> None:
        for pipe in self._pipes:
            os.close(pipe)


def live_as_worker(orders: Orders) -> None:
    """Hold a part of the model. As of vLLM's, it ends when its engine does."""
    if knob("STUBBORN"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        select.select([], [], [])
    orders.wait()
    os._exit(0)


# ---- engines


class Engine:
    """The engine of one rank, with its workers."""

    def __init__(self, options: argparse.Namespace, rank: int, reports: int, orders: Orders) -> None:
        """Take the rank, and where to say that it is ready."""
        self._options = options
        self._rank = rank
        self._reports = reports
        self._orders = orders
        self._workers = Family()
        self._head: socket.socket | None = None

    def live(self) -> None:
        """Start, register, and wait for the end."""
        for number in range(self._options.tensor_parallel_size):
            self._workers.start(f"VLLM::Worker_TP{number}", live_as_worker)
        if knob("DAEMON"):
            self._start_daemon()
        self._pause(seconds("WARMUP_S"))
        if knob("FAIL_RANK") == str(self._rank):
            self._fail()
        if self._options.has_other_nodes:
            self._register()
        os.write(self._reports, _READY)
        while True:
            self._pause(None)

    def _pause(self, timeout_s: float | None, *others: socket.socket) -> None:
        if self._orders.wait(timeout_s, *others) == _END:
            self._end(0)

    def _end(self, code: int) -> NoReturn:
        self._workers.end()
        os._exit(code)

    def _fail(self) -> NoReturn:
        say(f"Traceback (most recent call last):\nRuntimeError: rank {self._rank} cannot start")
        self._end(_FAILED)

    def _register(self) -> None:
        while (head := self._connect()) is None:
            self._pause(_POLL_S)  # the head may be started later than this node, and nothing announces it
        head.sendall(f"{self._rank}\n".encode())
        self._head = head
        self._pause(None, head)
        while head.recv(1) != _GO:
            self._pause(None)  # the head has gone: as of vLLM, the engine goes on to wait

    def _connect(self) -> socket.socket | None:
        address = (self._options.data_parallel_address, self._options.data_parallel_rpc_port)
        try:
            head = socket.create_connection(address)
        except OSError:
            return None
        if head.getsockname() == head.getpeername():  # it has met itself (TCP simultaneous open)
            head.close()
            return None
        return head

    def _start_daemon(self) -> None:
        child = os.fork()
        if child == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                set_title("VLLM::Daemon")
                self._workers.let_go()
                self._orders.let_go()
                select.select([], [], [])
            os._exit(0)
        os.waitpid(child, 0)


# ---- the API


class Api(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Answers on a socket that it was given."""

    daemon_threads = True

    def __init__(self, options: argparse.Namespace, listener: socket.socket, rank: int) -> None:
        """Take the socket, and its rank among the processes that answer there."""
        super().__init__(("", 0), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self._options = options
        self._rank = rank
        self._answers: Mapping[tuple[str, str], Callable[[], object]] = {
            ("GET", "/health"): dict,
            ("GET", "/v1/models"): self._models,
            ("GET", "/server_info"): self._server_info,
            ("POST", "/v1/completions"): self._completion,
            ("POST", "/v1/chat/completions"): self._chat_completion,
        }

    def start(self) -> None:
        self.socket.listen(128)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def answer(self, method: str, path: str, authorization: str) -> tuple[int, object]:
        """Give the status, and what is to be sent as JSON."""
        key = self._options.api_key
        answer = self._answers.get((method, path))
        if knob("503"):
            return 503, {}
        if key and path.startswith("/v1/") and authorization != f"Bearer {key}":
            return 401, {"error": "Unauthorized"}
        return (404, {"error": "Not Found"}) if answer is None else (200, answer())

    def _models(self) -> object:
        model = {"id": self._model, "object": "model", "created": int(time.time()), "owned_by": "vllm"}
        return {"object": "list", "data": [model]}

    @property
    def _model(self) -> str:
        return str(self._options.served_model_name or self._options.model)

    def _server_info(self) -> object:
        count = self._options.api_server_count
        parallel = {"_api_process_count": count, "_api_process_rank": self._rank}
        parallel["data_parallel_size"] = self._options.data_parallel_size
        return {"vllm_config": {"parallel_config": parallel}}

    def _completion(self) -> object:
        return self._made("text_completion", {"text": " and I am a stand-in"})

    def _chat_completion(self) -> object:
        return self._made("chat.completion", {"message": {"role": "assistant", "content": "I am a stand-in"}})

    def _made(self, kind: str, choice: dict[str, Any]) -> object:
        usage = {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
        choice |= {"index": 0, "finish_reason": "length", "logprobs": None}
        answer = {"id": f"cmpl-{time.monotonic_ns()}", "object": kind, "created": int(time.time())}
        return {**answer, "model": self._model, "choices": [choice], "usage": usage}


class Handler(socketserver.StreamRequestHandler):
    """Reads one request and answers it. The standard library's own takes as long to import as all the rest."""

    server: Api

    def handle(self) -> None:
        """Answer."""
        import json  # noqa: PLC0415 - it is slow, and a start needs none

        if knob("HANG"):
            threading.Event().wait()
        words = self.rfile.readline().decode("latin-1").split()
        headers = {}
        while line := self.rfile.readline().decode("latin-1").strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        self.rfile.read(int(headers.get("content-length", 0)))
        if len(words) < 2:  # whoever only looked whether the port is open
            return
        path = words[1].partition("?")[0]
        status, content = self.server.answer(words[0], path, headers.get("authorization", ""))
        body = json.dumps(content).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.wfile.write(f"{head}Connection: close\r\n\r\n".encode() + body)


def live_as_api_server(api: Api, orders: Orders) -> None:
    """Answer once it is told to, until it is told to end."""
    while (order := orders.wait()) != _END:
        if order == _READY:
            api.start()
    os._exit(0)


# ---- the root


class Root:
    """What was started by the command."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Bind what others may want as well, before anything is started."""
        self._options = options
        self._listener = None if options.headless else bound(options)
        self._registry = registry(options) if options.is_head else None
        self._ranks: dict[int, socket.socket] = {}
        self._ready = 0
        self._is_up = False
        self._listens_early = bool(knob("503") or knob("HANG"))
        self._family = Family()
        self._reports, self._report_end = os.pipe()
        self._signals, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def run(self) -> NoReturn:
        """Start everything, and go on until it is asked to end, or somebody fails."""
        own = self._start()
        if own is not None and self._listens_early:
            own.start()
        while True:
            if not self._is_up and self._is_complete():
                self._is_up = True
                self._answer(own)
            self._step()

    def _start(self) -> Api | None:
        first = self._options.first
        for rank in range(first, first + self._options.data_parallel_size_local):
            self._family.start(f"VLLM::EngineCore_DP{rank}", partial(self._live_as_engine, rank))
        if self._listener is None:
            return None
        count = self._options.api_server_count
        for rank in range(count if count > 1 else 0):
            api = Api(self._options, self._listener, rank)
            self._family.start(f"VLLM::APIServer_{rank}", partial(live_as_api_server, api))
        return Api(self._options, self._listener, 0) if count == 1 or self._listens_early else None

    def _live_as_engine(self, rank: int, orders: Orders) -> None:
        for own in (self._listener, self._registry):
            if own is not None:
                own.close()  # vLLM's are spawned: whatever becomes of the root, its port is free
        Engine(self._options, rank, self._report_end, orders).live()

    def _is_complete(self) -> bool:
        wanted = self._options.data_parallel_size if self._registry is not None else 0
        return len(self._ranks) >= wanted and self._ready >= int(self._options.data_parallel_size_local)

    def _answer(self, own: Api | None) -> None:
        say("INFO: Application startup complete.")
        if own is not None and not self._listens_early:
            own.start()
        self._family.tell(_READY)

    def _step(self) -> None:
        sources: list[Any] = [self._signals, self._reports] + [self._registry] * (self._registry is not None)
        ready, _, _ = select.select(sources, [], [])
        if self._signals in ready and signal.SIGTERM in os.read(self._signals, 1024):
            self._stop()
        if (who := self._family.ended()) is not None:
            self._fail(*who)
        if self._reports in ready:
            self._ready += len(os.read(self._reports, 1024))
        if self._registry is not None and self._registry in ready:
            self._take(self._registry)

    def _take(self, listening: socket.socket) -> None:
        connection, _ = listening.accept()
        said = connection.recv(16)
        if said:  # somebody who only looks whether the port is open says nothing
            self._ranks[int(said)] = connection
        if len(self._ranks) >= self._options.data_parallel_size:
            for rank in self._ranks.values():
                with contextlib.suppress(OSError):  # its node has ended
                    rank.sendall(_GO)

    def _stop(self) -> NoReturn:
        say("INFO: Shutting down")
        time.sleep(seconds("STOP_S"))  # stands for the requests that are finished
        self._end(0)

    def _fail(self, name: str, code: int) -> NoReturn:
        say(f"RuntimeError: {name} has ended with {code}. See root cause above.")
        self._end(code if code > 0 else 1)

    def _end(self, code: int) -> NoReturn:
        self._family.end()
        if self._options.uds:
            os.unlink(self._options.uds)
        os._exit(code)


def bound(options: argparse.Namespace) -> socket.socket:
    """Give the API's socket. As of vLLM, its port is bound long before somebody listens there."""
    if options.uds:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(options.uds)
        return listener
    return _bound(options.host or "", options.port)


def registry(options: argparse.Namespace) -> socket.socket:
    """Give the socket where the engines of all nodes register."""
    found = _bound(options.data_parallel_address, options.data_parallel_rpc_port)
    found.listen()
    return found


def _bound(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    return listener


if __name__ == "__main__":
    chosen = read_options()
    if knob("EXIT_0"):
        sys.exit(0)
    Root(chosen).run()
