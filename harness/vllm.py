"""The server classes of vLLM's test suite (tests/utils.py), with servers that a watchdog owns.

Change the import, and a suite that was written for `RemoteOpenAIServer` has its servers stopped in parallel, whatever
happens to pytest. What behaves otherwise than there is on the page MIGRATION.md. vLLM itself is not imported.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from typing import TYPE_CHECKING, ClassVar

from harness import specs
from harness.remote_server import IS_ROCM, RemoteVLLMServer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkContext, SpawnContext
    from multiprocessing.process import BaseProcess

__all__ = ["RemoteLaunchRenderServer", "RemoteOpenAIServer", "RemoteOpenAIServerCustom", "RemoteVLLMServer"]

# How often a child that has not been adopted yet looks whether its parent is there.
_GATE_S = 0.05


class RemoteOpenAIServer(RemoteVLLMServer):
    """`vllm serve`: an OpenAI-compatible server."""


class RemoteLaunchRenderServer(RemoteVLLMServer):
    """`vllm launch render`: a server that uses no GPU."""

    command: ClassVar[Sequence[str]] = ("vllm", "launch", "render")
    watches_gpus: ClassVar[bool] = False

    def _wait_for_gpu_memory_release(self, timeout: float = 30.0, log_interval: float = 10.0) -> None:
        """Wait for none."""


class RemoteOpenAIServerCustom(RemoteOpenAIServer):
    """A server that is a function, `child_process_fxn(env_dict, model, vllm_serve_args)`, in a forked child.

    It is adopted: stopped like the others, but a daemon that leaves its tree unseen is not found, and nobody judges its
    GPU memory. `proc` is the multiprocessing.Process.
    """

    proc: BaseProcess
    _gate: Connection | None = None

    def __init__(
        self,
        model: str,
        vllm_serve_args: Sequence[str],
        child_process_fxn: Callable[[Mapping[str, str] | None, str, list[str]], None],
        *,
        env_dict: Mapping[str, str] | None = None,
        seed: int | None = 0,
        auto_port: bool = True,
        max_wait_seconds: float | None = None,
    ) -> None:
        """Start the function in a child, and wait until it is ready."""
        __tracebackhide__ = True
        self.child_process_fxn = child_process_fxn
        super().__init__(
            model,
            vllm_serve_args,
            env_dict=env_dict,
            seed=seed,
            auto_port=auto_port,
            max_wait_seconds=max_wait_seconds,
        )

    def _start_server(self, model: str, vllm_serve_args: list[str], env_dict: Mapping[str, str] | None) -> None:
        context: SpawnContext | ForkContext
        context = multiprocessing.get_context("spawn") if IS_ROCM else multiprocessing.get_context("fork")
        environment = None if env_dict is None else specs.Environment(env_dict)
        arguments = (self.child_process_fxn, environment, model, vllm_serve_args)
        gate, self._gate = context.Pipe()
        self.proc = context.Process(target=_run_in_new_session, args=(gate, self._gate, os.getpid(), *arguments))
        try:
            self.proc.start()
        finally:
            gate.close()

    def _adopt(self, name: str) -> None:
        gate = self._gate
        if gate is None:  # a subclass has started a process of its own
            super()._adopt(name)
            return
        while self.proc.exitcode is None and not gate.poll(_GATE_S):
            pass  # until it leads a session, and a process group that is not this process's
        super()._adopt(name)
        with gate, contextlib.suppress(OSError):  # it may have died meanwhile: the wait says how
            gate.send_bytes(b"go")

    def _end_failed_start(self) -> None:
        super()._end_failed_start()
        if self._gate is not None:
            self._gate.close()  # by which a child ends whose start was interrupted before its number was known

    def _poll(self) -> int | None:
        return self.proc.exitcode

    def _reap(self) -> None:
        self.proc.join(0)


def _run_in_new_session(  # noqa: PLR0917 - multiprocessing passes them by position
    gate: Connection,
    parents_end: Connection,
    parent: int,
    function: Callable[[Mapping[str, str] | None, str, list[str]], None],
    env_dict: Mapping[str, str] | None,
    model: str,
    arguments: list[str],
) -> None:
    os.setsid()
    parents_end.close()
    gate.send_bytes(b"up")
    # Nobody would end it if the test process were killed before the watchdog knows of it. An end of file alone would
    # not do: a child that another thread has forked meanwhile holds the other end as well.
    while not gate.poll(_GATE_S):
        if os.getppid() != parent:
            return
    try:
        gate.recv_bytes()
    except EOFError:
        return
    function(env_dict, model, arguments)
