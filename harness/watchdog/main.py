"""Sets up the watchdog process, then runs its loop."""

from __future__ import annotations

import gc
import os
import signal
from typing import NoReturn, TypedDict

from harness.watchdog import kernel
from harness.watchdog.log import Log
from harness.watchdog.loop import Loop
from harness.watchdog.pipe import PipeEnd


class Config(TypedDict):
    """What the client gives: the Pipe's file descriptor, its own pid, the crash grace in seconds, a log path."""

    pipe: int
    client: int
    crash_grace_s: float
    log: str


def main(config: Config) -> NoReturn:
    """Own servers until the client has gone and every one has been stopped."""
    log = Log(config["log"])
    try:
        os.set_inheritable(config["pipe"], False)
        client = os.pidfd_open(config["client"])
        if os.getppid() != config["client"]:
            os._exit(0)  # the test process died before its pidfd was opened; nothing has been launched
        kernel.become_subreaper()
        kernel.set_name("harness-watchd")
        loop = Loop(PipeEnd(config["pipe"]), client, _wakeup(), log, crash_grace_s=config["crash_grace_s"])
        gc.collect()
        gc.freeze()  # keepers are forked from here: a later collection must not touch, and so copy, every page
        loop.run()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the keepers must learn of it by this process's end
        log.error(error)
    os._exit(1)


def _wakeup() -> int:
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
    return read_end
