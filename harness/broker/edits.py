"""Changes of the store: `make` makes one now or fails, `add` makes one later if it cannot be made now, in order."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from harness.broker import book as books
from harness.broker.store import Store, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.broker.book import Book
    from harness.watchdog.log import Log

_Answer = TypeVar("_Answer")
# What reading or changing the store may raise.
UNUSABLE = (StoreError, OSError, ValueError)
# The lock is held for well under a millisecond at a time: who waits for longer waits for a stopped process, and must go
# on seeing what happens meanwhile.
_LOCK_S = 0.2
_AGAIN_S = 0.1


class Edits:
    """The store, as this broker reads and changes it."""

    def __init__(self, store: Store, boot: str, log: Log) -> None:
        """Take the store, and the id of this boot: what was written before another boot is over."""
        self._store = store
        self._boot = boot
        self._log = log
        self._queue: list[tuple[Callable[[Book], Book], Callable[[], None] | None]] = []
        self._said = ""
        self.deadline: float | None = None

    def has_changed(self) -> bool:
        """Say whether somebody has changed the store since it was last read."""
        return self._store.has_changed()

    def read(self) -> Book:
        """Read without the lock; raises one of UNUSABLE."""
        return self._book(self._store.read())

    def _book(self, content: dict[str, object]) -> Book:
        return books.forget_other_boot(books.Book.from_json_dict(content), self._boot)

    def make(self, edit: Callable[[Book], tuple[Book, _Answer]]) -> _Answer:
        """Make a change now, under the lock; raises one of UNUSABLE."""

        def change(content: dict[str, object]) -> tuple[dict[str, object], _Answer]:
            changed, answer = edit(self._book(content))
            fresh = changed.to_json_dict()
            books.Book.from_json_dict(fresh)  # what nobody could read would end everybody's leases
            return fresh, answer

        return self._store.change(change, timeout_s=_LOCK_S)

    def add(self, edit: Callable[[Book], Book], then: Callable[[], None] | None = None) -> None:
        """Make a change, now or later but in order; `then` is called once it is made."""
        self._queue.append((edit, then))
        self.flush()

    def flush(self) -> None:
        """Make what is left to be made; `deadline` says when this has to be called again."""
        self.deadline = None
        if not self._queue:
            return
        queue, self._queue = self._queue, []
        try:
            self.make(lambda book: (_all(book, [edit for edit, _ in queue]), None))
        except UNUSABLE as error:
            self._queue = queue + self._queue
            self.deadline = time.monotonic() + _AGAIN_S
            if self._said != str(error):
                self._said = str(error)
                self._log.write(f"the store of leases cannot be changed now: {error}")
            return
        self._said = ""
        for _, then in queue:
            if then is not None:
                then()

    @property
    def is_idle(self) -> bool:
        """Say whether nothing is left to be made."""
        return not self._queue


def _all(book: Book, edits: list[Callable[[Book], Book]]) -> Book:
    for edit in edits:
        book = edit(book)
    return book
