"""What all brokers of a machine share, in a directory: one JSON object, read without a lock, changed under one.

Files: `book.0` and `book.1`, two slots that are written in turn and in place (see `slots`); `book.lock` and `book.turn`
(see `turns`). None is ever removed or renamed: all processes lock the same file, and need no right to the directory but
to write in its files. Whoever is killed (SIGKILL) between any two steps leaves the old content or the new, and no lock.
Nothing is flushed to the disk, since content counts in one boot only. The file system has to be local, for flock(2).

If neither slot is whole, the store is empty where that can be proved: nothing was ever written to the end, or what was
is of an earlier boot (a power failure may have torn it). Otherwise StoreError says which files to remove, and when.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from harness.broker import slots, turns
from harness.broker.directory import Directory, StoreError
from harness.broker.turns import StoreBusy
from harness.watchdog import ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Store", "StoreBusy", "StoreError"]

_SLOTS = ("book.0", "book.1")
_Answer = TypeVar("_Answer")
# The clock that stamps files moves on every 10 ms at the latest (CONFIG_HZ): until then two writes may look like one.
_CLOCK_S = 0.05
_MOST_LOOKS = 50
_PAUSE_S = 0.001


class _Look(NamedTuple):
    """Both slots at about one moment, and what tells whether they have been written since."""

    found: tuple[slots.Slot, ...]
    stamps: tuple[tuple[int, ...], ...]

    def newest(self) -> slots.Slot | None:
        """Give the newest slot, an empty one where nothing was ever written; None if it is lost or being written."""
        place = slots.newest(self.found)
        if place is not None:
            return self.found[place]
        return None if any(slot.is_lost for slot in self.found) else slots.EMPTY

    def is_settled(self) -> bool:
        """Say whether another write, or the rest of one, would have another stamp."""
        latest_s = max((stamp[-1] / 1e9 for stamp in self.stamps if stamp), default=0.0)
        is_whole = all(slot.content is not None or not stamp for slot, stamp in zip(*self, strict=True))
        return is_whole and time.time() - latest_s > _CLOCK_S


class Store:
    """The store in one directory. Not for several threads at once."""

    def __init__(self, directory: str, *, is_shared: bool = False) -> None:
        """Take the directory; nothing is touched yet. A shared one must exist; else it is made with mode 0700."""
        self._path = directory
        self._is_shared = is_shared
        self._boot = _boot()
        self._stamps: tuple[tuple[int, ...], ...] | None = None

    def read(self) -> dict[str, Any]:
        """Give the newest content, without the lock; {} if there is none. Raises StoreError."""
        with self._explained():
            try:
                directory = Directory(self._path, is_shared=self._is_shared)
            except FileNotFoundError:
                if self._is_shared:
                    raise
                self._stamps = ((), ())
                return {}
            with directory:
                look, slot = self._look(directory, tries=_MOST_LOOKS)
        self._stamps = look.stamps if look.is_settled() else None
        return slot.content or {}

    def has_changed(self) -> bool:
        """Say whether the content may be other than what `read` gave last. Costs microseconds."""
        return self._stamps is None or self._stamps != tuple(map(self._stamp, _SLOTS))

    def _stamp(self, name: str) -> tuple[int, ...]:
        try:
            return _stamp(os.stat(f"{self._path}/{name}", follow_symlinks=False))
        except OSError:
            return ()

    def change(self, edit: Callable[[dict[str, Any]], tuple[dict[str, Any], _Answer]], *, timeout_s: float) -> _Answer:
        """Have `edit` make the next content out of the newest, under the lock; give its answer.

        Everybody waits for `edit`, which may change what it is given. What it leaves as it was is not written; if it
        raises, nothing is. Raises StoreBusy if the lock is not to be had in `timeout_s`, else StoreError.
        """
        with contextlib.ExitStack() as stack:
            with self._explained():
                directory = stack.enter_context(Directory(self._path, is_shared=self._is_shared, make=True))
                stack.callback(os.close, turns.take(directory, timeout_s))
                look, slot = self._look(directory, tries=1)
            content, answer = edit(slot.content or {})
            with self._explained():
                text = slots.to_text(content)
                if text != slot.text:
                    self._write(directory, look, slots.encode(slot.sequence + 1, self._boot, text))
            return answer

    def _look(self, directory: Directory, *, tries: int) -> tuple[_Look, slots.Slot]:
        """Look until there is a whole slot. Without the lock, one may be written while the other is read."""
        for left in reversed(range(tries)):
            raws, stamps = zip(*[_read_slot(directory, name) for name in _SLOTS], strict=True)
            look = _Look(tuple(slots.decode(raw, self._boot) for raw in raws), stamps)
            if (newest := look.newest()) is not None:
                return look, newest
            time.sleep(_PAUSE_S if left else 0)
        raise StoreError(
            f"neither {self._path}/{_SLOTS[0]} nor {_SLOTS[1]} can be read, where it stood which GPUs are leased: when"
            " no run uses GPUs any more, remove both files"
        )

    def _write(self, directory: Directory, look: _Look, raw: bytes) -> None:
        newest = slots.newest(look.found)
        descriptor = directory.open(_SLOTS[0 if newest is None else 1 - newest], os.O_RDWR, make=True)
        try:
            written = 0
            while written < len(raw):
                written += os.pwrite(descriptor, raw[written:], written)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except slots.NotASlot as error:
            raise StoreError(f"the GPU store in {self._path}: {error}") from None
        except OSError as error:
            raise StoreError(f"the GPU store in {self._path}: {error.strerror}: {error.filename or ''}") from error


def _read_slot(directory: Directory, name: str) -> tuple[bytes, tuple[int, ...]]:
    try:
        descriptor = directory.open(name, os.O_RDONLY)
    except FileNotFoundError:
        return b"", ()
    try:
        found = os.fstat(descriptor)  # first: a write that follows gives it another stamp
        return os.pread(descriptor, min(found.st_size, slots.LONGEST_BYTES), 0), _stamp(found)
    finally:
        os.close(descriptor)


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _boot() -> str:
    try:
        return ledger.boot()
    except OSError:
        return "unknown"  # a sandbox may hide it: then no content is known to be of another boot
