"""The file of `--harness-report`: an event on each line, written as it happens, and in order once the run has ended."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from harness.reporting import events

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from harness.reporting.events import Fields

# No FIFO that nobody reads may hold up a run.
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK


class ReportFile:
    """A report that is being written. What a run that is killed has said until then is in it."""

    def __init__(self, path: Path) -> None:
        """Make it, and its directory; raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._descriptor: int | None = os.open(path, _FLAGS | os.O_APPEND | os.O_TRUNC, 0o644)

    def add(self, event: Fields) -> None:
        """Write an event; a full disk must not fail a test."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.write(self._descriptor, events.line(event))

    def finish(self, ordered: Sequence[Fields]) -> None:
        """Write all events in order in place of what is there, all or nothing; raises OSError."""
        if self._descriptor is None:
            return
        os.close(self._descriptor)
        self._descriptor = None
        if not self._path.is_file():
            return  # a pipe or a device has had each event already
        new = self._path.with_name(f"{self._path.name}.{os.getpid()}.new")
        try:
            new.write_bytes(b"".join(map(events.line, ordered)))
            new.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink()
            raise

    def __str__(self) -> str:
        """Give its path."""
        return str(self._path)
