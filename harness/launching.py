"""`launch`, with one signature for watchdogs and groups: checks what is asked for, then hands it on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from harness import asynchronous, specs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from harness.server import Server
    from harness.specs import Ready, StrPath


def _kill(server: Server) -> None:
    server.kill()


class Launcher(ABC):
    """Something that servers are launched through."""

    @abstractmethod
    def launch_spec(self, spec: specs.ServerSpec) -> Server:
        """Start a server that has been checked; for `launch` only."""

    def launch(
        self,
        command: Sequence[StrPath],
        *,
        name: str | None = None,
        env: Mapping[str, str | None] | None = None,
        cwd: StrPath | None = None,
        ready: Ready = None,
        ready_timeout_s: float | None = None,
        grace_s: float = specs.DEFAULT_GRACE_S,
        ask: str = "root",
        ports: Iterable[str] = (),
        gpus: object = None,
        gpu_memory_mib: int | None = None,
        deadline_s: float | None = None,
    ) -> Server:
        """Start a server and return once its process exists.

        The program is found as `subprocess.Popen` finds it. In `command` and the values of `env` the tokens `{port}`,
        `{port:NAME}`, `{host}`, `{name}` and `{log_dir}` are replaced. The environment is `os.environ` at this moment
        with `env` over it (None removes a name); the working directory is this process's, or `cwd`. `ready` is what
        `wait_ready` waits for, up to `ready_timeout_s` seconds (480). When the server is stopped, `grace_s` is the time
        between SIGTERM and SIGKILL, and `ask` says whether SIGTERM goes to the root or to its process group. Each of
        `ports` names one more port to hold. `deadline_s` after its launch the watchdog stops the server. `gpus` leases
        so many GPUs, or a list of UUIDs and indexes, `gpu_memory_mib` a share of one, or of each (README, "GPUs").

        Raises SpecError or GpuUnavailable (nothing was started), or LaunchFailed (nothing is left).
        """
        __tracebackhide__ = True  # the arguments hold environment values, which a traceback must not show
        env = specs.sealed(env)
        spec = specs.ServerSpec(
            name=specs.optional_name(name),
            command=specs.command(command),
            environment=specs.environment(env),
            templated=specs.templated(env),
            cwd=specs.working_directory(cwd),
            ready=specs.ready(ready),
            ready_timeout_s=specs.optional_seconds(ready_timeout_s, "ready_timeout_s") or specs.DEFAULT_READY_TIMEOUT_S,
            grace_s=specs.seconds(grace_s, "grace_s"),
            ask=specs.ask(ask),
            ports=specs.ports(ports),
            deadline_s=specs.optional_seconds(deadline_s, "deadline_s"),
            gpus=specs.gpus(gpus, gpu_memory_mib, env),
        )
        return self.launch_spec(specs.check_tokens(spec))

    launch_async = asynchronous.form_of(launch, undo=_kill)
