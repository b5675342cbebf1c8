"""Starts a server's root: the code between fork and execve.

Runs in a keeper and in its child. The child reports a failure through a pipe that execve closes, so that end of file
means success, whatever the program does next.
"""

from __future__ import annotations

import errno
import os
import select
import signal

from harness import procfs
from harness.records import Record
from harness.watchdog import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from harness.messages import Launch
    from harness.watchdog.ledger import Entry
    from harness.watchdog.log import Log

# The limit of processes is reached, or there is no memory: another way to fork would fail as well.
_ABOUT_FORKING = {errno.EAGAIN, errno.ENOMEM}
# Dispositions that are "ignore" survive execve: the watchdog's and Python's own must not reach the server.
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ)


class Root(Record):
    """A root that was forked: its pid, a pidfd on it, and the pipe that says whether its program was executed."""

    pid: int
    pidfd: int
    failure_pipe: int


def open_log(path: str) -> int:
    """Open a server's log file, made with mode 0600, never through a link; raises OSError with the reason in words."""
    try:
        # Opened without waiting: a FIFO that somebody has put there would hold the launch for good.
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise OSError(error.errno, f"open the log file {path!r}: {error.strerror}") from None
    os.set_blocking(log, True)
    return log


def fork_root(launch: Launch, log: int, entry: Entry, watchdogs_log: Log) -> Root:
    """Fork the root, whose output goes to the descriptor `log`; raises OSError if that fails."""
    keeper = os.getpid()
    read_end, write_end = os.pipe()
    try:
        pid = _fork_into(entry.cgroup, watchdogs_log)
        if pid == 0:
            _execute(launch, log, keeper, write_end)
    finally:
        os.close(write_end)
    try:
        return Root(pid, os.pidfd_open(pid), read_end)
    except OSError:
        # No descriptor is left: a root that nobody can hold must not begin its work.
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _fork_into(cgroup: str, watchdogs_log: Log) -> int:
    # A server outside of its cgroup is stopped as well, only not in one step.
    try:
        if cgroup:
            return kernel.fork_into(cgroup)
    except OSError as error:
        if error.errno in _ABOUT_FORKING:
            raise
        watchdogs_log.reopened().write(f"a server is launched outside of its cgroup: {error.strerror}")
    try:
        return os.fork()
    except OSError as error:
        raise OSError(error.errno, f"fork: {error.strerror}") from None


def read_failure(root: Root) -> str | None:
    """Read what the child reported once the pipe is readable: None means that the program runs."""
    try:
        failure = os.read(root.failure_pipe, select.PIPE_BUF).decode(errors="replace")
    finally:
        os.close(root.failure_pipe)
    if not failure and not procfs.has_executed(root.pid):
        return "it ended before its program was executed"  # a child that is killed closes the pipe as well
    return failure or None


def _execute(launch: Launch, log: int, keeper: int, failure_pipe: int) -> NoReturn:
    doing = "prepare to execute"
    try:
        os.setsid()
        kernel.signal_at_parent_death(signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(127)
        _redirect(log)
        doing = f"change to the directory {launch.cwd!r}"
        os.chdir(launch.cwd)
        doing = f"execute {launch.command[0]!r}"
        _restore_signals()
        os.execvpe(launch.command[0], launch.command, launch.environment)  # noqa: S606 - that is what a launch is
    except BaseException as error:  # noqa: BLE001 - whatever it is, this child must end here and say why
        reason = error.strerror if isinstance(error, OSError) else str(error)
        os.write(failure_pipe, f"cannot {doing}: {reason}".encode(errors="replace")[: select.PIPE_BUF])
    os._exit(127)


def _redirect(log: int) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)


def _restore_signals() -> None:
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
