"""The test process, seen from the watchdog: interrupt it when its test hangs, say so where people look, and end it."""

from __future__ import annotations

import os
import signal
import stat

from harness import private, procfs
from harness.stacks import readable
from harness.watchdog import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.messages import BeginTest

_ANEW = os.O_WRONLY | os.O_APPEND | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
_MOST_STACK_BYTES = 1 << 18
_TTY, _FOREGROUND_GROUP = 4, 5  # among the fields of /proc/PID/stat that follow the command name, proc(5)


class ClientProcess:
    """The test process, which this process was forked from."""

    def __init__(self, pid: int, pidfd: int) -> None:
        """Take its pid, and a pidfd on it, which stays the caller's."""
        self._pid = pid
        self._pidfd = pidfd

    def is_in_use(self) -> bool:
        """Say whether a debugger traces it (ptrace(2)), or its user has suspended it from its terminal."""
        status = procfs.status(self._pid)
        is_stopped = status.get("State", "").startswith("T")
        return status.get("TracerPid", "0") != "0" or (is_stopped and self._is_in_the_background())

    def interrupt(self, number: int) -> None:
        """Send the signal that makes it write its stacks and look up.

        One that was stopped is continued: the signal's handler runs first.
        """
        self._send(number)
        self._send(signal.SIGCONT)

    def _is_in_the_background(self) -> bool:
        fields = procfs.stat_fields(self._pid)
        has_terminal = fields[_TTY:_FOREGROUND_GROUP] not in ([], [b"0"])
        found = procfs.stat(self._pid)
        return has_terminal and found is not None and int(fields[_FOREGROUND_GROUP]) != found.process_group

    def end(self, test: BeginTest, text: str) -> None:
        """Write why, with the stacks that it wrote when it was interrupted, to its standard error and to the report.

        Then kill it.
        """
        try:
            message = f"harness: {text}\n{_stacks(test.stacks)}".encode(errors="replace")
            _write(lambda: self._standard_error(test.stderr), b"\n" + message)
            _write(lambda: private.open_file(test.report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), message)
        finally:
            self._send(signal.SIGKILL)

    def _standard_error(self, number: int) -> int:
        path = f"/proc/{self._pid}/fd/{number}"
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode) or stat.S_ISSOCK(mode):
            # A file that is opened anew is written from its beginning, over what others write; a socket cannot be.
            try:
                return kernel.get_descriptor(self._pidfd, number)
            except OSError:
                return os.open(path, _ANEW)
        # A pipe or terminal is opened anew, so that a full one blocks nobody, whatever mode it is in elsewhere.
        return os.open(path, _ANEW)

    def _send(self, number: int) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return


def _stacks(path: str) -> str:
    try:
        descriptor = private.open_file(path, os.O_RDONLY)
    except OSError as error:
        return f"Its stacks cannot be read: {error.strerror}.\n"
    try:
        written = os.read(descriptor, _MOST_STACK_BYTES)
    finally:
        os.close(descriptor)
    if not written:
        return "It wrote no stacks: the state directory is full, or the signal was blocked.\n"
    return f"Its stacks at the deadline, and later once more:\n{readable(written.decode(errors='replace'))}\n"


def _write(open_it: Callable[[], int], message: bytes) -> None:
    try:
        descriptor = open_it()
    except OSError:
        return  # the other place has it
    try:
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            import socket  # noqa: PLC0415 - an idle watchdog does without: 0.3 MiB

            socket.socket(fileno=os.dup(descriptor)).send(message, socket.MSG_DONTWAIT)
        else:
            os.write(descriptor, message)
    except OSError:
        return
    finally:
        os.close(descriptor)
