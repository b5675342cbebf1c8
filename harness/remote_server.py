"""The root of the classes of `harness.vllm`: a server with the constructor, names and hooks of vLLM's test suite."""

from __future__ import annotations

import contextlib
import itertools
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from harness import current, deployments, dropin_launch, inference_clients, serve_arguments, shutdowns, specs, subtrees
from harness.client import Watchdog  # noqa: TC001 - now: a child that is forked while a thread imports it would hang
from harness.errors import GpuNotReleased, HarnessError, Leaked, ServerExited, SpecError
from harness.health import Health
from harness.outcomes import StopReport
from harness.signals import describe
from harness.watchdog.ports import PortHolds

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

    from anthropic import Anthropic, AsyncAnthropic
    from openai import AsyncOpenAI, OpenAI

    from harness.server import Server

_DEFAULT_WAIT_S = 480.0
# vLLM's suite gives the root so long beyond its own --shutdown-timeout; on ROCm, whose engines take that long by
# themselves when no timeout is given, once more.
_GRACE_S = 15.0
IS_ROCM = Path("/dev/kfd").exists()
# What a device may hold beyond what it held before: of vLLM's suite, for telemetry of its user's own.
_HEADROOM_BYTES = 2 << 30
_RELEASE_S = 120.0
_POLL_S = 1.0
_KILL_S = 5.0

_numbers = itertools.count()


class RemoteVLLMServer:
    """A server of vLLM, started and ready once this object is made, and stopped when it is left as a context manager.

    `vllm_serve_args` follow the model in the command line, with a free `--port` (`auto_port`) unless `--uds` is among
    them, `--seed` (`seed`; None: without) and `--hf-overrides`. `env_dict` is merged over `os.environ`. It may be made
    in any thread. `gpus` and `gpu_memory_mib` lease GPUs as `harness.Watchdog.launch` does; without them the devices
    that its environment names are shared with other such servers, and only watched: a stop waits for their memory.

    Raises SpecError (also a ValueError) for wrong arguments, ServerExited or NotReady if it was not ready within
    `max_wait_seconds` (480); what was started has been stopped then. All of them are RuntimeErrors.
    """

    command: ClassVar[Sequence[str]] = ("vllm", "serve")
    """What is run, before the model and the arguments."""
    watches_gpus: ClassVar[bool] = True
    """Whether the memory of the devices that it sees is watched without `gpus` and `gpu_memory_mib`."""
    DUMMY_API_KEY: ClassVar[str] = "token-abc123"

    proc: Any = None
    """What `subprocess.Popen` offers, of the server's root."""
    _arguments: serve_arguments.ServeArguments
    _pre_server_gpu_memory: float | None = None
    _is_launched = False

    def __init__(
        self,
        model: str,
        vllm_serve_args: Sequence[str],
        *,
        env_dict: Mapping[str, str] | None = None,
        seed: int | None = 0,
        auto_port: bool = True,
        max_wait_seconds: float | None = None,
        override_hf_configs: Mapping[str, Any] | None = None,
        gpus: object = None,
        gpu_memory_mib: int | None = None,
    ) -> None:
        """Start the server, and wait until it is ready."""
        __tracebackhide__ = True  # the environment holds tokens, which a traceback must not show
        env_dict = specs.sealed(env_dict)
        given = vllm_serve_args = specs.arguments(vllm_serve_args, "the server")
        wait_s = specs.optional_seconds(max_wait_seconds or None, "max_wait_seconds") or _DEFAULT_WAIT_S
        self._wanted_gpus = specs.gpus(gpus, gpu_memory_mib, env_dict)
        self._number = next(_numbers)
        self._server: Server | None = None
        self._hold = self._held_port(given) if auto_port else None
        try:
            port = None if self._hold is None else self._hold.ports[""]
            arguments = serve_arguments.completed(given, port=port, seed=seed, hf_overrides=override_hf_configs)
            self._read(arguments)
            self._pre_download_model(model, self._arguments)
            self._pre_server_gpu_memory = self._get_gpu_memory_used()
            with deployments.starting(self._arguments.deployment) as self._deployment:
                self._start(model, arguments, env_dict, wait_s)
        except BaseException:
            self._end_failed_start()
            raise

    def _held_port(self, arguments: Sequence[str]) -> PortHolds | None:
        if serve_arguments.names(arguments, "-p", "--port"):
            raise SpecError("You have manually specified the port when `auto_port=True`.")
        return None if serve_arguments.names(arguments, "--uds") else PortHolds([""])

    def _read(self, arguments: list[str]) -> None:
        found = self._arguments = serve_arguments.read(arguments)
        self.host = found.host
        self.port = found.port
        self.uds = found.uds
        self.show_hidden_metrics = found.shows_hidden_metrics

    def _start(self, model: str, arguments: list[str], env_dict: Mapping[str, str] | None, wait_s: float) -> None:
        __tracebackhide__ = True
        self._start_server(model, arguments, env_dict)
        if self._server is None:
            self._adopt(self._name(model))
        self._wait_for_server(url=self.url_for("health"), timeout=wait_s)

    def _adopt(self, name: str) -> None:
        try:
            spec = specs.ServerSpec(name=specs.name(name), grace_s=self._grace_s)
            self._watchdog.adopt_spec(self.proc.pid, spec, self._hold_server)
        except SpecError:
            code = self._poll()
            if code is None:
                raise
            raise ServerExited(f"{name!r} ended with {describe(code)}", server=name, returncode=code) from None

    def _hold_server(self, server: Server) -> None:
        self._server = server

    def _end_failed_start(self) -> None:
        # Why it failed is what is to be read.
        with contextlib.suppress(HarnessError):
            if self._server is None:
                self._end_unowned()
        with contextlib.suppress(HarnessError):
            self._shutdown()

    def _end_unowned(self) -> None:
        """End a process of the test's own that no watchdog owns, or whose watchdog has died."""
        pid = getattr(self.proc, "pid", None)
        is_owned = self._server is not None and (self._is_launched or self._server.has_ended)
        if pid is not None and not is_owned:
            subtrees.kill(pid, wait_s=_KILL_S)
            self._reap()

    @property
    def server(self) -> Server:
        """Give the server as the harness knows it: its log, its processes, its outcome."""
        if self._server is None:
            raise HarnessError("this server has not been started")
        return self._server

    @property
    def _watchdog(self) -> Watchdog:
        return current.watchdog()

    @property
    def _grace_s(self) -> float:
        return specs.seconds(self._get_process_termination_timeout(), "the process termination timeout")

    def _name(self, model: str) -> str:
        return f"{Path(model).name or type(self).__name__}-{self._number}"

    # ---- what subclasses override

    def _create_cli_subcommand(self) -> Any:
        """Give nothing: vLLM's parser is not used. Kept for subclasses that define it."""

    def _pre_download_model(self, model: str, args: Any) -> None:
        """Do nothing: the server downloads what it needs, within `max_wait_seconds`. Subclasses may fetch it before."""

    def _get_gpu_memory_used(self) -> float | None:
        """Give None: devices are read by the watchdog. Subclasses may give what is in use of others, in bytes."""
        return None

    def _start_server(self, model: str, vllm_serve_args: list[str], env_dict: Mapping[str, str] | None) -> None:
        """Start the server. A subclass may start a process of its own, as `self.proc`: it is adopted."""
        __tracebackhide__ = True
        self._launch([*self.command, model, *vllm_serve_args], env_dict, name=self._name(model))

    def _poll(self) -> int | None:
        """Give the exit code of the root, None while it runs."""
        code: int | None = self.proc.poll()
        return code

    def _get_process_termination_timeout(self) -> float:
        """Give how long the root may take to exit after SIGTERM, in seconds, before all is killed."""
        own_s = self._arguments.shutdown_timeout_s
        return (own_s or (_GRACE_S if IS_ROCM else 0.0)) + _GRACE_S

    def _terminate_process_tree(self) -> None:
        """Stop the server; no process of it is left, whatever it has started."""
        if self._server is not None:
            self._server.stop()

    def _wait_for_gpu_memory_release(self, timeout: float = _RELEASE_S, log_interval: float = 10.0) -> None:
        """Raise GpuNotReleased if the memory of its devices did not come back.

        By the watchdog's verdict, which the stop has waited for; of devices that `_get_gpu_memory_used` reads, by
        waiting `timeout` seconds for what was in use before, and 2 GiB. A reading that fails is no release.
        """
        del log_interval  # a line tells of each wait as it is
        if self._pre_server_gpu_memory is not None:
            self._wait_for_own_telemetry(self._pre_server_gpu_memory + _HEADROOM_BYTES, timeout)
        outcome = None if self._server is None else self._server.outcome
        if outcome is not None:
            StopReport((outcome,), outcome.seconds).raise_if_leaked()

    def _wait_for_own_telemetry(self, target: float, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while (used := self._get_gpu_memory_used()) is None or used > target:
            if time.monotonic() >= deadline:
                found = "cannot be read" if used is None else f"{used / 1e9:.2f} GB"
                wanted = f"at most {target / 1e9:.2f} GB were wanted"
                raise GpuNotReleased(f"GPU memory did not release within {timeout:.0f} s: {found}, {wanted}")
            time.sleep(_POLL_S)  # a user's own telemetry, of which nothing is known

    def _wait_for_server(self, *, url: str, timeout: float) -> None:
        """Wait until the path of `url` gives 200; what listens there must be the server itself."""
        server = self.server
        server.ready = self._health(urlsplit(url).path)
        try:
            server.wait_ready(timeout)
        except ServerExited as error:
            code = self._poll() if error.returncode is None else None
            if code is None:
                raise
            text = error.message.replace(describe(None), describe(code))
            raise ServerExited(text, server=server.name, returncode=code) from None

    # ---- starting

    def _launch(self, command: Sequence[str], env_dict: Mapping[str, str] | None, *, name: str) -> None:
        """Launch a command as this server, from its watchdog; for `_start_server`."""
        __tracebackhide__ = True
        # The test process may have initialised CUDA, and a worker that is forked from vLLM's own process then fails.
        environment = specs.environment(
            specs.Environment({"VLLM_WORKER_MULTIPROC_METHOD": "spawn", **(env_dict or {})})
        )
        spec = specs.ServerSpec(
            name=name,
            command=specs.command(list(command)),
            environment=environment,
            cwd=specs.working_directory(None),
            grace_s=self._grace_s,
            port=None if self._arguments.is_headless else self.port,
            host="" if self._hold is not None else self.host or "",
            is_literal=True,
            gpus=self._wanted_gpus,
        )
        dropin_launch.launch(self._watchdog, spec, self._take, watches_gpus=self.watches_gpus)
        self._let_go()

    def _take(self, server: Server) -> None:
        self._is_launched = True
        self._server = server
        self.proc = server.proc

    def _let_go(self) -> None:
        # From now on the watchdog holds the port; of a process of the test's own, this process does.
        if self._hold is not None:
            self._hold.close()

    def _health(self, path: str) -> Health:
        found = self._arguments
        place: dict[str, Any] = {"uds": self.uds} if self.uds else {"host": found.connect_to, "port": self.port}
        return Health(path, owners=self._owners, look=self._look, **place)

    def _owners(self) -> list[int]:
        # A headless node serves nothing: its health is that of another server, its head's.
        if not self._arguments.is_headless:
            return self.server.pids()
        there = [server for server in self._watchdog.servers if not server.has_ended]
        return [pid for server in there for pid in server.pids()]

    def _look(self) -> None:
        """Raise what says that it will never be ready."""
        self._deployment.check()
        # That of a user's subclass may know more than the watchdog sees.
        is_users = not type(self)._poll.__module__.startswith("harness.")  # noqa: SLF001 - its own class
        if is_users and (code := self._poll()) is not None:
            raise HarnessError(f"it has ended with {describe(code)}")

    # ---- using it

    @property
    def url_root(self) -> str:
        """Give the URL of the server; for one on a socket file, the one that a transport on that file takes."""
        if self.uds:
            return f"http://{Path(self.uds).name}"
        host = f"[{self.host}]" if ":" in str(self.host) else self.host
        return f"http://{host}:{self.port}"

    def url_for(self, *parts: str) -> str:
        """Give the URL of a path, in parts."""
        return f"{self.url_root}/{'/'.join(part.strip('/') for part in parts)}"

    def _client(self, library: str, kind: str, base_url: str, options: dict[str, Any]) -> Any:
        key = self.DUMMY_API_KEY
        return inference_clients.make(library, kind, base_url=base_url, api_key=key, uds=self.uds, options=options)

    def get_client(self, **kwargs: Any) -> OpenAI:
        """Make a client of the library openai; by default it waits 600 s for an answer, and asks once."""
        client: OpenAI = self._client("openai", "OpenAI", self.url_for("v1"), kwargs)
        return client

    def get_async_client(self, **kwargs: Any) -> AsyncOpenAI:
        """As `get_client`, for async code."""
        client: AsyncOpenAI = self._client("openai", "AsyncOpenAI", self.url_for("v1"), kwargs)
        return client

    def get_client_anthropic(self, **kwargs: Any) -> Anthropic:
        """Make a client of the library anthropic; by default it waits 600 s for an answer, and asks once."""
        client: Anthropic = self._client("anthropic", "Anthropic", self.url_root, kwargs)
        return client

    def get_async_client_anthropic(self, **kwargs: Any) -> AsyncAnthropic:
        """As `get_client_anthropic`, for async code."""
        client: AsyncAnthropic = self._client("anthropic", "AsyncAnthropic", self.url_root, kwargs)
        return client

    # ---- ending it

    @property
    def _shutdown_complete(self) -> bool:
        """Whether its end is known: an interrupted shutdown is not complete, and can be done again."""
        return self._server is not None and self._server.has_ended

    @classmethod
    def shutdown_many(cls, servers: Iterable[RemoteVLLMServer | None]) -> None:
        """Stop servers in parallel, with their memory; those that were never started (None) or have ended are fine.

        Raises Leaked or GpuNotReleased, once all have been stopped, for what is left.
        """
        # Another thread may still add to the list: those of this moment. The oldest first, whose baseline is all of
        # theirs.
        found = [server for server in list(servers) if server is not None]
        there = sorted(found, key=lambda server: server._number)  # noqa: SLF001 - of the same class
        plain = [server for server in there if server._is_stopped_by_watchdog]  # noqa: SLF001
        stops = shutdowns.stops_of(server._server for server in plain if server._server is not None)  # noqa: SLF001
        stops += [server._terminate_process_tree for server in there if server not in plain]  # noqa: SLF001
        deadline = time.monotonic() + _RELEASE_S
        shutdowns.run(stops, [partial(server._end, deadline) for server in there])  # noqa: SLF001

    @property
    def _is_stopped_by_watchdog(self) -> bool:
        return type(self)._terminate_process_tree is RemoteVLLMServer._terminate_process_tree  # noqa: SLF001 - its own

    def _end(self, deadline: float) -> None:
        self._let_go()
        if self._server is not None:
            self._end_unowned()
            self._reap()
            if isinstance(self._server.ready, Health):
                self._server.ready.forget()
            self._wait_for_gpu_memory_release(timeout=max(0.0, deadline - time.monotonic()))

    def _reap(self) -> None:
        """Take the exit status of a process of the test's own, which nobody else can."""
        self._poll()

    def _shutdown(self) -> None:
        type(self).shutdown_many([self])

    def __enter__(self) -> Any:
        """Give the server itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server; raises Leaked or GpuNotReleased for what is left, if the body raised nothing."""
        try:
            self._shutdown()
        except (Leaked, GpuNotReleased):
            if error is None:
                raise
