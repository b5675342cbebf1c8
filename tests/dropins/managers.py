"""Managers of data-parallel deployments, in the shape that vLLM's tests have them.

Each starts its servers in threads that call the constructor, joins them without a limit, and raises from `__enter__` if
not all are there, whereupon nobody calls `__exit__`. That one empties the list, stops all, and prints an error instead
of raising it. Ports are fixed, but parameters here: several of these tests run at the same time.
"""

from __future__ import annotations

import threading
import traceback
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from dropins.serving import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MODEL = "ibm-research/PowerMoE-3b"
_BASE_ARGUMENTS = ["--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "128", "--enforce-eager"]
_ADDRESS = ["--data-parallel-address", "127.0.0.1"]


class Options(NamedTuple):
    """What the managers have in common.

    `port` is the first of those that answer, `rpc_port` where ranks meet. `environments` are for the servers, by their
    numbers. `visible_devices` names the variable by which a platform hides devices.
    """

    port: int
    rpc_port: int
    api_server_count: int = 1
    tp_size: int = 1
    environments: Mapping[int, Mapping[str, str]] = {}
    server_class: type[Server] = Server
    visible_devices: str = "STANDIN_VISIBLE_DEVICES"


class Manager(ABC):
    """What the managers have in common."""

    def __init__(self, dp_size: int, options: Options) -> None:
        """Start nothing yet."""
        self.dp_size = dp_size
        self.options = options
        self.servers: list[tuple[Server, list[str]] | None] = []
        self.threads: list[threading.Thread] = []
        self.errors: list[Exception] = []

    @abstractmethod
    def _begin(self) -> int:
        """Start the threads; give how many servers there are to be."""

    def __enter__(self) -> list[Server]:
        count = self._begin()
        for thread in self.threads:
            thread.join()
        if self.errors:
            raise Exception("Servers failed to start") from self.errors[0]  # noqa: TRY002 - as users write it
        started = self._started()
        if len(started) != count:
            raise Exception("Servers failed to start")  # noqa: TRY002 - as users write it
        return started

    def __exit__(self, *_: object) -> None:
        servers = self._started()
        self.servers.clear()
        try:
            self.options.server_class.shutdown_many(servers)
        except Exception as error:  # noqa: BLE001 - as users write it
            print(f"Error stopping servers: {error}")  # noqa: T201 - as users write it

    def _started(self) -> list[Server]:
        return [entry[0] for entry in self.servers if entry is not None]

    def _in_thread(self, start: Callable[..., object], *arguments: object) -> None:
        self.threads.append(threading.Thread(target=start, args=arguments))
        self.threads[-1].start()

    def _arguments(self, size_local: int) -> list[str]:
        found = [*_BASE_ARGUMENTS, "--data-parallel-size", str(self.dp_size)]
        found += ["--data-parallel-size-local", str(size_local), "--tensor-parallel-size", str(self.options.tp_size)]
        return [*found, "--data-parallel-rpc-port", str(self.options.rpc_port)]

    def _api(self, number: int = 0) -> list[str]:
        port = self.options.port + number
        return ["--port", str(port), "--api-server-count", str(self.options.api_server_count)]

    def _made(self, number: int, arguments: list[str], devices: range) -> Server:
        environment = {"VLLM_SERVER_DEV_MODE": "1", **self.options.environments.get(number, {})}
        if devices:
            environment[self.options.visible_devices] = ",".join(map(str, devices))
        return self.options.server_class(MODEL, arguments, env_dict=environment, auto_port=False)


class ExternalLBServerManager(Manager):
    """A server for each rank, each with an API of its own; a balancer outside chooses."""

    def start_rank(self, rank: int, dp_size: int | None = None) -> Server:
        """Start one rank; with a new `dp_size`, one that is added to a deployment that runs."""
        arguments = [*self._arguments(1), "--data-parallel-rank", str(rank), *self._api(rank)]
        arguments += ["--data-parallel-size", str(dp_size or self.dp_size)]
        tp_size = self.options.tp_size
        server = self._made(rank, arguments, range(rank * tp_size, (rank + 1) * tp_size))
        self.servers.append((server, arguments))
        return server

    def _begin(self) -> int:
        def start(rank: int) -> None:
            try:
                self.start_rank(rank)
            except Exception as error:  # noqa: BLE001 - as users write it
                self.errors.append(error)

        for rank in range(self.dp_size):
            self._in_thread(start, rank)
        return self.dp_size


class HybridLBServerManager(Manager):
    """A server for each node, whose API balances among the ranks of that node."""

    def __init__(self, dp_size: int, options: Options, dp_size_local: int = 2) -> None:
        """Take how many ranks a node has."""
        super().__init__(dp_size, options)
        self.dp_size_local = dp_size_local

    def _begin(self) -> int:
        nodes = self.dp_size // self.dp_size_local
        for node in range(nodes):
            self._in_thread(self._start, node)
        return nodes

    def _start(self, node: int) -> None:
        local = self.dp_size_local
        arguments = [*self._arguments(local), "--data-parallel-start-rank", str(node * local)]
        arguments += ["--data-parallel-hybrid-lb", *self._api(node), *_ADDRESS]
        on_node = local * self.options.tp_size
        server = self._made(node, arguments, range(node * on_node, (node + 1) * on_node))
        server.__enter__()
        self.servers.append((server, arguments))


class _HeadlessManager(Manager):
    """The list has a place for each server from the start."""

    def _start(self, number: int, arguments: list[str], devices: range) -> None:
        arguments += _ADDRESS
        if "--headless" in arguments:
            # vLLM's tests leave that out, and have the head on the port that is the default.
            arguments += ["--port", str(self.options.port)]
        try:
            server = self._made(number, arguments, devices)
            server.__enter__()
            self.servers[number] = (server, arguments)
        except Exception:
            traceback.print_exc()
            raise


class MultinodeInternalLBServerManager(_HeadlessManager):
    """A head whose API balances among all ranks, and headless nodes with the others."""

    def __init__(self, dp_size: int, options: Options, dp_per_node: int = 1) -> None:
        """Take how many ranks a node has."""
        super().__init__(dp_size, options)
        self.dp_per_node = dp_per_node
        self.servers = [None] * (dp_size // dp_per_node)

    def _begin(self) -> int:
        for number, rank in enumerate(range(0, self.dp_size, self.dp_per_node)):
            own = ["--headless", "--data-parallel-start-rank", str(rank)] if rank else self._api()
            devices = range(rank, rank + self.options.tp_size * self.dp_per_node)
            self._in_thread(self._start, number, [*self._arguments(self.dp_per_node), *own], devices)
        return len(self.servers)


class APIOnlyServerManager(_HeadlessManager):
    """A server that has the API alone, and a headless one with all engines."""

    def __init__(self, dp_size: int, options: Options) -> None:
        """Take how many engines there are to be."""
        super().__init__(dp_size, options)
        self.servers = [None, None]

    def _begin(self) -> int:
        self._in_thread(self._start, 0, [*self._arguments(0), *self._api()], range(0))
        engines = range(self.dp_size * self.options.tp_size)
        self._in_thread(self._start, 1, [*self._arguments(self.dp_size), "--headless"], engines)
        return len(self.servers)


KINDS = ["internal", "api-only", "external", "hybrid"]


def make(kind: str, options: Options, nodes: int = 2) -> Manager:
    """Give a manager of so many servers with a rank each, in a hybrid two; of API-only there are always two."""
    if kind == "internal":
        return MultinodeInternalLBServerManager(nodes, options)
    if kind == "external":
        return ExternalLBServerManager(nodes, options)
    return HybridLBServerManager(2 * nodes, options) if kind == "hybrid" else APIOnlyServerManager(2, options)
