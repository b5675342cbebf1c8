"""A launch that is held in execve, since its program is leased (fcntl(2), F_SETLEASE): it is neither up nor failed."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class Pending:
    """A command whose program is not executed before `let_go`, or before this is left as a context manager."""

    def __init__(self, directory: Path) -> None:
        program = shutil.copy(shutil.which("sleep") or "", str(directory / "leased"))
        self.command = [program, "1000"]
        self._previous = signal.signal(signal.SIGIO, signal.SIG_IGN)  # by which the kernel asks for the lease
        self._descriptor = os.open(program, os.O_RDONLY)
        fcntl.fcntl(self._descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)

    def __enter__(self) -> Pending:  # noqa: PYI034 - typing.Self is there from Python 3.11 on
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self._descriptor)
        signal.signal(signal.SIGIO, self._previous)

    def let_go(self) -> None:
        """Give the lease back: the program is executed."""
        fcntl.fcntl(self._descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
