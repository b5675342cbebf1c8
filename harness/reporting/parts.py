"""Events on their way from pytest-xdist's workers to its controller: a file of each worker, in the controller's run.

A file keeps what a worker has said before it died. The controller reads on while they write.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from harness import private
from harness.reporting import events

if TYPE_CHECKING:
    from pathlib import Path

    from harness.reporting.events import Fields

_PREFIX = "events-"
_MOST_BYTES = 1 << 20


class Part:
    """A worker's file, which is made when it has something to say."""

    def __init__(self, run: Path) -> None:
        """Take the directory of the controller's run."""
        self._path = run / f"{_PREFIX}{os.getpid()}.jsonl"

    def add(self, event: Fields) -> None:
        """Write an event, in one system call; where that fails the reports do without it."""
        with contextlib.suppress(OSError):
            # Not held open: a test may well count what is open.
            descriptor = private.open_file(str(self._path), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            try:
                os.write(descriptor, events.line(event))
            finally:
                os.close(descriptor)


class Parts:
    """All workers' files, as the controller reads them."""

    def __init__(self, run: Path) -> None:
        """Take the directory of the controller's run, which need not be there yet."""
        self._run = run
        self._read: dict[str, int] = {}

    def new(self) -> list[Fields]:
        """Give the events that have come since the last call; a line that is not whole yet comes with the next one."""
        try:
            names = [name for name in os.listdir(self._run) if name.startswith(_PREFIX)]
        except OSError:
            return []  # no worker has said anything
        return [event for name in names for event in self._new_of(name)]

    def _new_of(self, name: str) -> list[Fields]:
        found: list[Fields] = []
        try:
            descriptor = private.open_file(str(self._run / name), os.O_RDONLY)
        except OSError:
            return found
        try:
            while data := os.pread(descriptor, _MOST_BYTES, self._read.get(name, 0)):
                whole = data[: data.rfind(b"\n") + 1]
                if not whole:
                    break
                self._read[name] = self._read.get(name, 0) + len(whole)
                found += events.parse(whole)
        finally:
            os.close(descriptor)
        return found

    def remove(self) -> None:
        """Remove the files that were read."""
        for name in self._read:
            with contextlib.suppress(OSError):
                (self._run / name).unlink()
        with contextlib.suppress(OSError):
            self._run.rmdir()  # unless logs are in it
