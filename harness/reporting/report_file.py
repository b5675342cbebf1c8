"""The file of `--harness-report`: an event on each line, written as it happens, and in order once the run has ended."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING

from harness.reporting import events

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from harness.reporting.events import Fields

# No FIFO that nobody reads may hold up a run.
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_APPEND
# What is a name for something that is open, like /dev/stdout, is written to and never replaced.
_NOT_OURS = ("/dev/", "/proc/")


class ReportFile:
    """A report that is being written. What a run that is killed has said until then is in it."""

    def __init__(self, path: Path) -> None:
        """Make it, and its directory, and leave what is there until `begin`; raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._descriptor: int | None = os.open(path, _FLAGS, 0o666)
        self._has_begun = False
        is_file = stat.S_ISREG(os.fstat(self._descriptor).st_mode)
        self._is_ours = is_file and not any(text.startswith(_NOT_OURS) for text in _names(path))

    def __str__(self) -> str:
        """Give its path."""
        return str(self._path)

    def begin(self, earlier: Sequence[Fields]) -> None:
        """Begin, with these events, in place of what an earlier run has left."""
        if self._descriptor is not None and self._is_ours:
            os.ftruncate(self._descriptor, 0)
        self._has_begun = True
        for event in earlier:
            self.add(event)

    def add(self, event: Fields) -> None:
        """Write an event; a full disk must not fail a test."""
        if self._descriptor is not None and self._has_begun:
            with contextlib.suppress(OSError):
                os.write(self._descriptor, events.line(event))

    def finish(self, ordered: Sequence[Fields]) -> None:
        """Write all events in order in place of what is there, all or nothing; raises OSError."""
        if self._descriptor is None:
            return
        if self._has_begun and not self._is_ours:
            self.add(ordered[-1])  # a pipe or a device has had the others already
        mode = stat.S_IMODE(os.fstat(self._descriptor).st_mode)
        os.close(self._descriptor)
        self._descriptor = None
        if self._has_begun and self._is_ours:
            self._replace(b"".join(map(events.line, ordered)), mode)

    def _replace(self, data: bytes, mode: int) -> None:
        path = self._path.resolve()  # a link stays one
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        try:
            new.write_bytes(data)
            new.chmod(mode)
            new.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink()
            raise


def _names(path: Path) -> list[str]:
    """Give a path and each that it leads to, link by link."""
    found = [os.path.abspath(path)]
    while len(found) < 40:  # the kernel's own limit, path_resolution(7)  # noqa: PLR2004 - it has no name there
        try:
            target = os.readlink(found[-1])
        except OSError:
            break
        found.append(os.path.join(os.path.dirname(found[-1]), target))
    return found
