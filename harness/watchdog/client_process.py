"""The test process, seen from the watchdog: interrupt it when its test hangs, say so where people look, and end it."""

from __future__ import annotations

import os
import signal

from harness import private, procfs

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

    def interrupt(self, number: int) -> bool:
        """Send the signal that makes it write its stacks and look up; False, and nothing sent, while it is in use.

        In use: a debugger traces it (ptrace(2)), or its user has suspended it from its terminal. One that was stopped
        otherwise is continued: the signal's handler runs first.
        """
        status = procfs.status(self._pid)
        is_stopped = status.get("State", "").startswith("T")
        if status.get("TracerPid", "0") != "0" or (is_stopped and self._is_in_the_background()):
            return False
        self._send(number)
        self._send(signal.SIGCONT)
        return True

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
            message = f"harness: {text}\n".encode(errors="replace") + _stacks(test.stacks)
            # Opened anew, its standard error does not depend on what the test process does.
            _append(lambda: os.open(f"/proc/{self._pid}/fd/{test.stderr}", _ANEW), b"\n" + message)
            _append(lambda: private.open_file(test.report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), message)
        finally:
            self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return


def _stacks(path: str) -> bytes:
    try:
        descriptor = private.open_file(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        written = os.read(descriptor, _MOST_STACK_BYTES)
    finally:
        os.close(descriptor)
    return b"Its stacks when the deadline had passed:\n" + written if written else b"It wrote no stacks.\n"


def _append(open_it: Callable[[], int], message: bytes) -> None:
    try:
        descriptor = open_it()
    except OSError:
        return  # a socket, or nothing at all: the other place has it
    try:
        os.write(descriptor, message)
    except OSError:
        return
    finally:
        os.close(descriptor)
