"""Sets up the watchdog process, then runs its loop."""

from __future__ import annotations

import fcntl
import os
import signal

from harness import procfs
from harness.watchdog import kernel, limits
from harness.watchdog.client_process import ClientProcess
from harness.watchdog.log import Log
from harness.watchdog.loop import Loop
from harness.watchdog.pipe import PipeEnd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn, TypedDict

    from harness.watchdog.ledger import Ledger

    class Config(TypedDict):
        """What the client gives: the Pipe's file descriptor, its own pid, the crash grace in seconds, a log path.

        `controller` is the pid of its parent if this must not outlive it either (pytest-xdist's controller), else None.
        `cgroup` says whether cgroups may be used.
        """

        pipe: int
        client: int
        controller: int | None
        crash_grace_s: float
        log: str
        cgroup: bool


def main(config: Config) -> NoReturn:
    """Own servers until the client has gone and every one has been stopped."""
    log = Log(config["log"])
    try:
        os.set_inheritable(config["pipe"], False)
        # Were it stopped, it must see the test process's end. The signal comes when the thread that forked it ends; it
        # is harmless then.
        kernel.signal_at_parent_death(signal.SIGCONT)
        _end_signals_of(config["pipe"])
        owners = _open_owners(config["client"], config["controller"])
        kernel.become_subreaper()
        limits.raise_descriptors()
        kernel.set_name("harness-watchd")
        loop = Loop(
            PipeEnd(config["pipe"]),
            ClientProcess(config["client"], owners[0]),
            owners,
            _wakeup(),
            log=log,
            open_ledger=lambda: _ledger(config, log),
            crash_grace_s=config["crash_grace_s"],
        )
        loop.run()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the keepers must learn of it by this process's end
        log.mistake(error)
    os._exit(1)


def _end_signals_of(pipe: int) -> None:
    # Until now its end would have woken this process (harness/forking.py); from now on each request would.
    flags = fcntl.fcntl(pipe, fcntl.F_GETFL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, flags & ~os.O_ASYNC)


def _ledger(config: Config, log: Log) -> Ledger:
    from harness.watchdog.ledger import Ledger  # noqa: PLC0415 - an idle watchdog does without: 0.2 MiB

    return Ledger(os.path.dirname(config["log"]), config["client"], log, use_cgroups=config["cgroup"])


def _open_owners(client: int, controller: int | None) -> list[int]:
    # Nothing has been launched yet, so there is nothing to do but end where one of them has died already. Each number
    # is checked after its pidfd was opened: it still belongs to a parent, so it was not given to another process.
    try:
        owners = [os.pidfd_open(client)]
        if controller is not None:
            owners.append(os.pidfd_open(controller))
    except ProcessLookupError:
        os._exit(0)
    found = procfs.stat(client)
    if os.getppid() != client or found is None or controller not in {None, found.parent}:
        os._exit(0)
    return owners


def _wakeup() -> int:
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    nothing: dict[int, object] = {}
    signal.signal(signal.SIGCHLD, nothing.get)  # does nothing, and in C: no Python code runs between two instructions
    return read_end
