"""Those of this broker's leases that are waited for: it looks whether their turn has come, and says what they wait for.

The rules are those of `grants`; here devices are read in time, and the store is looked at often enough.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness import procfs
from harness.broker import grants, remnants, visible, words
from harness.broker.book import Waiter, Want, Who
from harness.broker.edits import UNUSABLE
from harness.broker.readings import Fault
from harness.broker.store import StoreBusy
from harness.lease_messages import LeaseStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.broker.book import Book
    from harness.broker.edits import Edits
    from harness.broker.readers import Opened, Readers
    from harness.broker.readings import Device, Read, Reading
    from harness.lease_messages import Lease
    from harness.watchdog.log import Log

# How often somebody who waits looks whether the store has changed, and how often at everything else: at processes that
# may have died, at devices whose memory may be back.
_LOOK_S = 0.004
_LOOK_CLOSELY_S = 0.1
_SAY_S = 1.0
# Of a name in the store, which everybody reads.
_MOST_CHARACTERS = 300
# A reading takes 50 microseconds.
_SLOW_S = 0.1
# NVML's start takes 10 ms, and seconds where no persistence mode keeps the driver loaded.
_OPEN_S = 30.0
# How long somebody who only wants devices watched waits for one that cannot be read.
_WATCH_S = 2.0


@dataclass
class _Waiting:
    """One lease that has not been granted."""

    number: int
    id: str
    request: Lease
    began: float
    waiter: Waiter | None = None
    is_enqueued: bool = False
    text: str = ""


class TooFew(Exception):  # noqa: N818 - it is what happened
    """The test process sees fewer devices than are wanted."""


class Waits:
    """The leases that are waited for, in the order in which they were asked for."""

    def __init__(
        self,
        edits: Edits,
        readers: Readers,
        me: Who,
        log: Log,
        *,
        report: Callable[[LeaseStatus], None],
        granted: Callable[[int, str, Lease, tuple[str, ...]], None],
    ) -> None:
        """Take the store, the readers, who this process is, and whom to tell."""
        self._edits = edits
        self._readers = readers
        self._me = me
        self._log = log
        self._report = report
        self._granted = granted
        self._waiting: dict[int, _Waiting] = {}
        self._opened: Opened | None = None
        self._asked: dict[str, tuple[int, float]] = {}
        self._readings: dict[str, tuple[int, Reading | Fault]] = {}
        self._next_close_look = 0.0
        self._next_words = 0.0

    @property
    def devices(self) -> tuple[Device, ...]:
        """Give all devices of this machine; none before NVML has been opened."""
        return () if self._opened is None else self._opened.devices

    @property
    def is_idle(self) -> bool:
        """Say whether nobody waits."""
        return not self._waiting

    def pause_s(self) -> float | None:
        """Give after how long `look` has to be called again."""
        return _LOOK_S if self._waiting else None

    # ---- what comes in

    def add(self, number: int, request: Lease) -> None:
        """Begin to wait for a lease."""
        name = f"{self._me.pid}-{self._me.start_time}-{number}"
        self._waiting[number] = _Waiting(number, name, request, time.monotonic())
        self.look(is_close=True)

    def end(self, number: int) -> bool:
        """Wait for this lease no longer; False if it was not waited for."""
        waiting = self._waiting.pop(number, None)
        if waiting is None:
            return False
        self._withdraw(waiting)
        return True

    def clear(self) -> None:
        """Wait for nothing any more: the test process has gone."""
        for number in list(self._waiting):
            self.end(number)

    def opened(self, opened: Opened) -> None:
        """Take the devices."""
        self._opened = opened
        self.look(is_close=True)

    def read(self, read: Read) -> None:
        """Take a reading, if it was begun after it was asked for."""
        if read.uuid in self._asked and read.begun >= self._asked[read.uuid][1]:
            generation, _ = self._asked.pop(read.uuid)
            self._readings[read.uuid] = (generation, read.reading)
            self.look(is_close=True)

    # ---- looking

    def look(self, *, is_close: bool = False) -> None:
        """Look whether somebody's turn has come; `is_close`: also if the store has not changed."""
        if not self._waiting:
            return
        now = time.monotonic()
        if now >= self._next_close_look:
            is_close = True
            self._next_close_look = now + _LOOK_CLOSELY_S
            self._ask_again()
        if not (is_close or self._edits.has_changed()):
            return
        for waiting in list(self._waiting.values()):
            try:
                self._advance(waiting, now)
            except StoreBusy as error:
                waiting.text = str(error)
            except UNUSABLE as error:
                self._refuse(waiting, f"the store of leases cannot be used: {error}")
            if waiting.number in self._waiting and now - waiting.began >= waiting.request.wait_s:
                self._refuse(waiting, f"it has waited {waiting.request.wait_s:g} s: {self._text(waiting)}")
        self._say(now)

    def _ask_again(self) -> None:
        # Memory may have come back, and a process may have gone, without anybody's changing the store.
        try:
            book = self._edits.read()
        except UNUSABLE:
            return  # whoever looks at the leases says so
        for waiting in self._waiting.values():
            for uuid in waiting.waiter.want.candidates if waiting.waiter is not None else ():
                self._ask(book, uuid)

    def _ask(self, book: Book, uuid: str) -> None:
        now = time.monotonic()
        generation, asked_at = self._asked.get(uuid, (-1, now))
        if generation != book.generation(uuid):
            self._asked[uuid] = (book.generation(uuid), now)
            self._readers.ask(uuid)
        if now - asked_at > _SLOW_S:
            # Others are granted meanwhile: a driver that hangs on one device must not hold up the rest.
            fault = Fault("unknown", f"NVML has not answered for {now - asked_at:.1f} s")
            self._readings[uuid] = (book.generation(uuid), fault)

    def _advance(self, waiting: _Waiting, now: float) -> None:
        if waiting.waiter is None and not self._resolve(waiting, now):
            return
        before = self._edits.read()
        after, (answer, lines) = self._step(before, waiting)
        if after != before:
            answer, lines = self._edits.make(lambda book: self._step(book, waiting))
        for line in lines:
            self._log.write(line)
        self._take(waiting, answer)

    def _step(self, book: Book, waiting: _Waiting) -> tuple[Book, tuple[grants.Answer, tuple[str, ...]]]:
        """Do what follows from the book for one who waits, and for what the dead have left."""
        now = time.time()
        if waiting.waiter is not None and grants.waiter_of(book, waiting.id) is None:
            # It is new, or was stopped for so long that others have gone before it.
            book = grants.enqueue(book, waiting.waiter)
        book, lines = remnants.prune(
            book, self._is_alive, self._readings, now, waiting.request.release_s, is_stopped=self._is_stopped
        )
        book, answer = grants.grant(book, waiting.id, self._readings, now, user=os.geteuid())
        return book, (answer, lines)

    def _take(self, waiting: _Waiting, answer: grants.Answer) -> None:
        waiting.is_enqueued = True
        if isinstance(answer, grants.Granted):
            del self._waiting[waiting.number]
            self._readings = {}  # they were baselines of devices that nobody had
            self._granted(waiting.number, waiting.id, waiting.request, answer.devices)
        elif isinstance(answer, grants.Refused):
            is_quarantined = any(uuid in self._edits.read().quarantines for uuid in self._candidates_of(waiting))
            (self._refuse if is_quarantined else self._refuse_unknown)(waiting, answer.text)
        elif self._cannot_be_watched(waiting):
            self._refuse_unknown(waiting, "its devices cannot be read")
        else:
            book = self._edits.read()
            for uuid in answer.needs:
                self._ask(book, uuid)

    @staticmethod
    def _candidates_of(waiting: _Waiting) -> tuple[str, ...]:
        return () if waiting.waiter is None else waiting.waiter.want.candidates

    def _cannot_be_watched(self, waiting: _Waiting) -> bool:
        """Say whether it wants all that is visible, and one of that has not been readable for a while."""
        if waiting.request.count or time.monotonic() - waiting.began < _WATCH_S:
            return False
        readings = [self._readings.get(uuid, (0, None))[1] for uuid in self._candidates_of(waiting)]
        return any(isinstance(reading, Fault) for reading in readings)

    def _resolve(self, waiting: _Waiting, now: float) -> bool:
        """Find out which devices it may be; False if that is not known yet, or if it has been refused."""
        if self._opened is None:
            if now - waiting.began >= _OPEN_S:
                self._refuse_unknown(waiting, f"NVML has not answered for {_OPEN_S:g} s: the driver hangs")
            return False
        if self._opened.failure:
            self._refuse_unknown(waiting, self._opened.failure, is_absent=self._opened.is_absent)
            return False
        try:
            candidates = self._candidates(waiting.request)
        except TooFew as error:
            self._refuse(waiting, str(error), is_absent=True)
            return False
        except visible.VisibilityError as error:
            self._refuse_unknown(waiting, str(error))
            return False
        request = waiting.request
        want = Want(request.count or len(candidates), tuple(device.uuid for device in candidates), request.memory_mib)
        name, test = request.name[:_MOST_CHARACTERS], request.test[:_MOST_CHARACTERS]
        waiting.waiter = Waiter(0, waiting.id, name, test, self._me, time.time(), want)
        return True

    def _candidates(self, request: Lease) -> list[Device]:
        seen = visible.visible(self.devices, request.visible, request.order)
        chosen = seen
        if request.devices:
            chosen = visible.pick(seen, [int(name) if name.isdecimal() else name for name in request.devices])
        if not chosen or not 0 <= request.count <= len(chosen):
            setting = "is not set" if request.visible is None else f"is {request.visible!r}"
            raise TooFew(
                f"{request.count or 'some'} GPUs are wanted, but this process sees {len(seen)} of the machine's"
                f" {len(self.devices)} (CUDA_VISIBLE_DEVICES {setting})"
            )
        return chosen

    def _is_alive(self, who: Who) -> bool | None:
        if who.namespace != self._me.namespace:
            return None  # its numbers mean nothing here
        return procfs.may_be_alive(who.pid, who.start_time)

    def _is_stopped(self, who: Who) -> bool:
        found = procfs.stat(who.pid) if who.namespace == self._me.namespace else None
        return found is not None and found.state in "Tt"

    # ---- what goes out

    def _refuse(self, waiting: _Waiting, text: str, *, is_absent: bool = False) -> None:
        del self._waiting[waiting.number]
        self._withdraw(waiting)
        self._report(LeaseStatus(waiting.number, "absent" if is_absent else "refused", text, []))

    def _refuse_unknown(self, waiting: _Waiting, text: str, *, is_absent: bool = False) -> None:
        # Who wants all that is visible to its server goes on without, where that cannot be told.
        self._refuse(waiting, text, is_absent=is_absent or waiting.request.count == 0)

    def _withdraw(self, waiting: _Waiting) -> None:
        if waiting.is_enqueued:
            self._edits.add(lambda book: grants.withdraw(book, waiting.id))

    def _say(self, now: float) -> None:
        if not self._waiting or now < self._next_words:
            return
        self._next_words = now + _SAY_S
        for one in self._waiting.values():
            self._report(LeaseStatus(one.number, "waiting", self._text(one), []))

    def _text(self, waiting: _Waiting) -> str:
        """Say what it waits for."""
        if not waiting.is_enqueued:
            return waiting.text or "waiting for NVML"
        try:
            return words.describe_wait(self._edits.read(), waiting.id, time.time())
        except UNUSABLE as error:
            return str(error)
