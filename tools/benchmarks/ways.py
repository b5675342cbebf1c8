"""The ways in which suites own servers: this project's, those of other libraries, those of the field, and the bare one.

Each runs in the test process. What the libraries and the field cannot do, nothing here does for them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from importlib import util
from typing import TYPE_CHECKING

import psutil

from tools.benchmarks.processes import Ends

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import pytest

_KILL_S = 10.0
_SURVIVORS_POLL_S = 0.5
_HEADROOM_BYTES = 2 << 30
_MEMORY_POLL_S = 1.0
_STARTS_S = 60.0


class Way:
    """One way."""

    def start(self, command: Sequence[str], path: Path) -> None:
        """Start a server; `path` is where it tells its processes, once it is up."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Get ready for the stop, which is measured; all servers are up."""

    def stop(self) -> None:
        """Stop all that were started; return when the way says that it is done."""
        raise NotImplementedError


class Harness(Way):
    """Our own: one group, stopped in parallel by the watchdog."""

    def __init__(self, request: pytest.FixtureRequest, grace_s: float) -> None:
        self._group = request.getfixturevalue("server_group")
        self._grace_s = grace_s
        self._share_mib = int(os.environ["BENCH_GPU_MIB"]) if _HAS_GPU else None

    def start(self, command: Sequence[str], path: Path) -> None:
        self._group.launch(command, name=path.name, grace_s=self._grace_s, gpu_memory_mib=self._share_mib)

    def stop(self) -> None:
        self._group.stop()


class XProcess(Way):
    """pytest-xprocess: `ensure` for each, `terminate` for each, one after another."""

    def __init__(self, request: pytest.FixtureRequest, grace_s: float) -> None:
        self._xprocess = request.getfixturevalue("xprocess")
        self._grace_s = grace_s
        self._names: list[str] = []

    def start(self, command: Sequence[str], path: Path) -> None:
        from xprocess import ProcessStarter  # noqa: PLC0415 - only this way needs it

        class Starter(ProcessStarter):  # type: ignore[misc]  # the library has no types
            args = command
            pattern = None
            timeout = _STARTS_S
            terminate_on_interrupt = True

            def startup_check(self) -> bool:
                return path.exists()

        self._xprocess.ensure(path.name, Starter)
        self._names.append(path.name)

    def stop(self) -> None:
        for name in self._names:
            self._xprocess.getinfo(name).terminate(timeout=self._grace_s)


class Mirakuru(Way):
    """mirakuru: an executor for each, `stop` of each, one after another."""

    def __init__(self, _request: pytest.FixtureRequest, grace_s: float) -> None:
        self._grace_s = grace_s
        self._executors: list[object] = []

    def start(self, command: Sequence[str], path: Path) -> None:
        del path
        from mirakuru.base import SimpleExecutor  # noqa: PLC0415 - only this way needs it

        executor = SimpleExecutor(list(command), timeout=self._grace_s, expected_returncode=0)
        self._executors.append(executor.start())

    def stop(self) -> None:
        from mirakuru.exceptions import ExecutorError  # noqa: PLC0415 - only this way needs it

        for executor in self._executors:
            with contextlib.suppress(ExecutorError):  # that it had to be killed
                executor.stop()  # type: ignore[attr-defined]  # held without its type, which is imported late


class _Popens(Way):
    """What has started its servers with subprocess.Popen."""

    def __init__(self, _request: pytest.FixtureRequest, grace_s: float) -> None:
        self.grace_s = grace_s
        self.servers: list[subprocess.Popen[bytes]] = []
        self.paths: list[Path] = []

    def start(self, command: Sequence[str], path: Path) -> None:
        self.servers.append(subprocess.Popen(command, start_new_session=True))
        self.paths.append(path)


class Popen(_Popens):
    """The fixture that most people write: terminate the tree as psutil sees it, wait, kill; one after another."""

    def stop(self) -> None:
        for server in self.servers:
            root = psutil.Process(server.pid)
            tree = [*root.children(recursive=True), root]
            for process in tree:
                process.terminate()
            _, alive = psutil.wait_procs(tree, timeout=self.grace_s)
            for process in alive:
                process.kill()
            psutil.wait_procs(alive, timeout=_KILL_S)
            server.wait()


class OneByOne(_Popens):
    """The field's first way: each server in turn, with a wait on the memory of all devices after each."""

    def __init__(self, request: pytest.FixtureRequest, grace_s: float) -> None:
        super().__init__(request, grace_s)
        self._base = _memory_bytes()

    def stop(self) -> None:
        for server in self.servers:
            self._end(server)
            _wait_for_memory(self._base)

    def _end(self, server: subprocess.Popen[bytes]) -> None:
        """Ask the root alone, wait, kill its process group, and look for what is left of that."""
        server.terminate()
        try:
            server.wait(self.grace_s)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(_KILL_S)
        deadline = time.monotonic() + self.grace_s
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
            while _has_members(server.pid) and time.monotonic() < deadline:
                time.sleep(_SURVIVORS_POLL_S)


class ThreadEach(OneByOne):
    """The field's second way (vLLM #41166): a thread for each server, and one wait on the memory of all devices."""

    def stop(self) -> None:
        threads = [threading.Thread(target=self._end, args=(server,)) for server in self.servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        _wait_for_memory(self._base)


class KillAlone(_Popens):
    """The field's shortest way (SGLang's kill_process_tree): SIGKILL for the tree that psutil sees, and no wait."""

    def stop(self) -> None:
        for server in self.servers:
            root = psutil.Process(server.pid)
            for process in [*root.children(recursive=True), root]:
                process.kill()


class Bare(_Popens):
    """The limit: signals to processes that are known beforehand, from somebody who waits for nothing else."""

    def prepare(self) -> None:
        self._trees = [json.loads(path.read_bytes()) for path in self.paths]
        self._ends = Ends(pid for tree in self._trees for pid in tree)

    def stop(self) -> None:
        for tree in self._trees:
            for pid in tree:
                os.kill(pid, signal.SIGTERM)
        try:
            self._ends.wait(self.grace_s)
        except TimeoutError:
            for server in self.servers:
                server.kill()
            self._ends.wait()
        for server in self.servers:
            server.wait()


def _has_members(group: int) -> bool:
    """Say whether a process group has a member that is no zombie, by a look at all processes."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


_HAS_GPU = "BENCH_GPU_MIB" in os.environ
_MEMORY_LIMIT_S = float(os.environ.get("BENCH_MEMORY_LIMIT_S", "120"))


def _memory_bytes() -> int:
    if not _HAS_GPU:
        return 0
    import pynvml  # noqa: PLC0415 - not without a GPU

    from tools.gpu_polling import total_bytes  # noqa: PLC0415 - as above

    pynvml.nvmlInit()
    return total_bytes()


def _wait_for_memory(base: int) -> None:
    deadline = time.monotonic() + _MEMORY_LIMIT_S
    while _memory_bytes() > base + _HEADROOM_BYTES and time.monotonic() < deadline:
        time.sleep(_MEMORY_POLL_S)


WAYS: Mapping[str, Callable[[pytest.FixtureRequest, float], Way]] = {
    "harness": Harness,
    "pytest-xprocess": XProcess,
    "mirakuru": Mirakuru,
    "Popen + psutil": Popen,
    "one by one": OneByOne,
    "thread each": ThreadEach,
    "kill alone": KillAlone,
    "limit": Bare,
}
OURS = ("harness", "limit")
ALONE = (*OURS, "thread each")
# mirakuru needs Python 3.11.
_LIBRARIES = ("pytest-xprocess", *(["mirakuru"] if util.find_spec("mirakuru") else []))
IN_TURN = (*_LIBRARIES, "Popen + psutil", "one by one")
PEERS = (*IN_TURN, "thread each")
