"""The functions of SGLang's test suite that start and end servers (sglang.test.test_utils), with a watchdog.

For unittest classes, under pytest or alone: change the import. What behaves otherwise is on the page MIGRATION.md.
SGLang itself is not imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from harness import current, dropin_launch, procfs, shutdowns, specs, subtrees
from harness.client import Watchdog  # noqa: F401 - now: a child that is forked while a thread imports it would hang
from harness.errors import HarnessError, NotReady, ServerExited, SpecError
from harness.health import Health
from harness.outcomes import StopReport
from harness.teeing import Tee

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from harness.popen import ServerProcess
    from harness.server import Server

COMMAND: list[str] = ["sglang", "serve"]
"""What `popen_launch_server` runs, before the arguments."""
PD_COMMAND: list[str] = ["python3", "-m", "sglang.launch_pd_server"]
"""What it runs with `pd_separated` or `num_replicas`."""

_HEALTH = "/health_generate"
_GRACE_S = 60.0
_TAIL_LINES = 50
# As SGLang's CI has it: a server may come to its ports while an earlier one is still leaving them.
_DEFAULTS = {"SGLANG_WAIT_PORT_TIMEOUT": "120"}
_OWN_OF_CI = ("_CI_OFFLINE_", "CI_OFFLINE_")
_OFFLINE = "HF_HUB_OFFLINE"

_tees: dict[int, Tee] = {}


@dataclass(frozen=True)
class _Start:
    """A start of a server, but for its environment."""

    command: list[str] = field(repr=False)  # a key may be among the arguments
    base_url: str
    api_key: str | None = field(repr=False)
    timeout_s: float
    files: tuple[Any, Any] | None


def popen_launch_server(  # noqa: PLR0917 - SGLang's signature
    model: str,
    base_url: str,
    timeout: float,
    api_key: str | None = None,
    other_args: Sequence[object] | None = None,
    env: Mapping[str, str] | None = None,
    return_stdout_stderr: tuple[Any, Any] | None = None,
    device: str = "auto",
    pd_separated: bool = False,  # noqa: FBT001, FBT002 - SGLang's signature
    num_replicas: int | None = None,
) -> ServerProcess:
    """Launch a server at `base_url`, wait until it is ready, at most `timeout` seconds, and give its root's process.

    `return_stdout_stderr` are two files for what it writes, by which its log has standard output alone. `device` is
    not looked at: "auto" is what a server does without. With HF_HUB_OFFLINE=1 in `env`, one that fails is launched once
    more with 0. Raises ServerExited or NotReady (also a TimeoutError); what was started has been stopped then.
    """
    __tracebackhide__ = True  # the environment and the key are secrets
    del device
    env = specs.sealed({**_DEFAULTS, **os.environ, **(env or {})})
    is_pd = pd_separated or num_replicas is not None
    command = _command(model, base_url, other_args or (), api_key, is_pd=is_pd)
    if num_replicas is not None and not pd_separated:
        command += ["--mixed", "--num-replicas", str(num_replicas)]
    start = _Start(command, base_url, api_key, specs.seconds(timeout, "timeout"), return_stdout_stderr)
    try:
        return _launched(start, env)
    except (ServerExited, NotReady):
        if (env or {}).get(_OFFLINE) != "1":
            raise
    return _launched(start, specs.sealed({**(env or {}), _OFFLINE: "0"}))


def _command(model: str, base_url: str, other: Sequence[object], api_key: str | None, *, is_pd: bool) -> list[str]:
    host, port = _address(specs.text(base_url, "base_url"))
    options = ("--lb-host", "--lb-port") if is_pd else ("--host", "--port")
    command = [*(PD_COMMAND if is_pd else COMMAND), "--model-path", model, *map(str, other)]
    command += [options[0], host, options[1], str(port)]
    return [*command, "--api-key", api_key] if api_key else command


def _address(base_url: str) -> tuple[str, int]:
    try:
        found = urlsplit(base_url)
        host, port = found.hostname, found.port
    except ValueError:
        host, port = None, None
    if not host or not port or found.scheme != "http":
        raise SpecError(f"base_url must be like http://127.0.0.1:21000, not {base_url!r}")
    return host, port


def _launched(start: _Start, env: Mapping[str, str] | None) -> ServerProcess:
    __tracebackhide__ = True
    tee = Tee(start.files) if start.files is not None else None
    command = tee.command(start.command) if tee is not None else start.command
    made: list[Server] = []
    try:
        spec = _spec(command, start.base_url, env)
        server = dropin_launch.launch(current.watchdog(), spec, made.append, watches_gpus=True)
        if tee is not None:
            _tees[server.pid] = tee
            tee.begin(server)
        server.ready = _health(server, start)
        server.wait_ready(start.timeout_s)
    except BaseException as error:
        for each in made:
            with contextlib.suppress(HarnessError):  # why it failed is what is to be read
                each.kill()
            _end_tee(each)
        if tee is not None:
            tee.end()
        if tee is not None and isinstance(error, HarnessError):
            error.log_tail = "\n".join(filter(None, (error.log_tail, tee.error_tail(_TAIL_LINES))))
        raise
    return server.proc


def _spec(command: list[str], base_url: str, env: Mapping[str, str] | None) -> specs.ServerSpec:
    environment = specs.environment(env)
    for name in [name for name in environment if name.startswith(_OWN_OF_CI)]:
        del environment[name]
    return specs.ServerSpec(
        name=f"sglang-{_address(base_url)[1]}",
        command=specs.command(command),
        environment=environment,
        cwd=specs.working_directory(None),
        grace_s=_GRACE_S,
        port=_address(base_url)[1],
        host=_address(base_url)[0],
        is_literal=True,
    )


def _health(server: Server, start: _Start) -> Health:
    host, port = _address(start.base_url)
    headers = ("Content-Type: application/json; charset=utf-8", f"Authorization: Bearer {start.api_key}")
    return Health(_HEALTH, owners=server.pids, look=lambda: None, host=host, port=port, headers=headers)


# ---- ending


def terminate_and_kill_process_tree(process: Any, terminate_timeout: float = 60, **kill_kwargs: Any) -> None:
    """Ask a server to exit, give it `terminate_timeout` seconds, and kill what is left of its tree.

    `process` is what `popen_launch_server` gave, or a process that this one has started itself. `kill_kwargs` are those
    of `kill_process_tree`. Raises Leaked or GpuNotReleased for what cannot be got back.
    """
    grace_s = specs.seconds(terminate_timeout, "terminate_timeout")
    server = _server(process.pid) or _adopted(process.pid)
    if server is None:
        _reap(process)
        return
    outcome = server.stop(grace_s=grace_s)
    _end_tee(server)
    _reap(process)
    kill_process_tree(process.pid, **kill_kwargs)
    StopReport((outcome,), outcome.seconds).raise_if_leaked()


def kill_process_tree(
    parent_pid: int | None,
    include_parent: bool = True,  # noqa: FBT001, FBT002 - SGLang's signature
    skip_pid: int | None = None,
    wait_timeout: float | None = 60,
) -> None:
    """Kill a server's whole tree, daemons included, also if its root has exited; or the tree of any process of ours.

    None is this process, without itself. Returns when the processes are gone and, of a server, its GPU memory is back,
    which has its own time (`harness_gpu_release_s`); with `wait_timeout` None at once. Raises Leaked or GpuNotReleased
    for what cannot be got back of a server, HarnessError for what is there of others after `wait_timeout` seconds,
    SpecError for a process that neither this one nor a server of it has started.
    """
    if parent_pid is None:
        parent_pid, include_parent = os.getpid(), False
    if parent_pid == os.getpid():
        _kill_own(include_parent=include_parent, skip_pid=skip_pid, wait_timeout=wait_timeout)
        return
    server = _server(parent_pid)
    if server is None or skip_pid is not None or not include_parent:
        subtrees.kill(parent_pid, include_root=include_parent, skip=skip_pid, wait_s=wait_timeout)
    elif wait_timeout is None:
        threading.Thread(target=server.kill, daemon=True).start()
    else:
        outcome = server.kill()
        _end_tee(server)
        StopReport((outcome,), outcome.seconds).raise_if_leaked()


def _kill_own(*, include_parent: bool, skip_pid: int | None, wait_timeout: float | None) -> None:
    roots = [server.pid for server in _alive()] + subtrees.others_of_this_process()
    shutdowns.run([partial(_kill_root, root, skip_pid, wait_timeout) for root in roots], [])
    if include_parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _kill_root(root: int, skip_pid: int | None, wait_timeout: float | None) -> None:
    if skip_pid in {root, *procfs.descendants(root)}:
        subtrees.kill(root, include_root=root != skip_pid, skip=skip_pid, wait_s=wait_timeout)
    else:
        kill_process_tree(root, wait_timeout=wait_timeout)


def _reap(process: Any) -> None:
    # The exit status of a process that this one has started, by subprocess or by multiprocessing.
    process.poll() if hasattr(process, "poll") else process.join(0)


def _alive() -> list[Server]:
    return [server for server in current.watchdog().servers if not server.has_ended]


def _server(pid: int) -> Server | None:
    """Give the server that has or had this root; of several, which shared a number, the last."""
    return next((server for server in reversed(current.watchdog().servers) if server.pid == pid), None)


def _adopted(pid: int) -> Server | None:
    try:
        return current.watchdog().adopt(pid)
    except SpecError:
        found = procfs.stat(pid)
        if found is None or found.state in "ZX":
            return None
        raise


def _end_tee(server: Server) -> None:
    tee = _tees.pop(server.pid, None)
    if tee is not None:
        tee.end()
