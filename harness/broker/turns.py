"""The lock of the store, taken in turns: filelock does the locking, and who waits is not overtaken.

A lock that is polled for goes to whoever asks at the right moment, and that is the one who has just released it and
asks again, while the others sleep. So there is a second lock, `book.turn`: who has that is the next, and asks often;
nobody else asks for `book.lock` meanwhile, the last holder included. A turn is a courtesy alone: if the one who has it
does not move on (it may be stopped), the others do without.
"""

from __future__ import annotations

import functools
import os
import random
import time
from typing import TYPE_CHECKING

from harness import procfs
from harness.broker.directory import StoreError
from harness.watchdog import ledger

if TYPE_CHECKING:
    from harness.broker.directory import Directory

LOCK = "book.lock"
TURN = "book.turn"
# Seconds between two tries, at random so that nobody is always behind another: of the next one, and of those behind.
_NEXT_S = (0.0003, 0.001)
_OTHERS_S = (0.001, 0.005)
# Much longer than sixteen take, one after another.
_PATIENCE_S = 0.25
_RECORD_BYTES = 96


class StoreBusy(StoreError):  # noqa: N818 - says what is the matter
    """The lock was not to be had in time; the text names who had it last, by pid."""


def take(directory: Directory, timeout_s: float) -> int:
    """Take the lock; give its descriptor, which unlocks it when it is closed.

    The file is opened and checked by us, and locked through its descriptor: so it is the one that was checked, and a
    lock costs some 10 microseconds. No process may be forked meanwhile: it would have the lock as well. Raises
    StoreBusy after `timeout_s`, StoreError, OSError.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        lock = directory.open(LOCK, os.O_RDWR, make=True)
        try:
            _wait(directory, lock, deadline)
            # Where a cleaner has removed it meanwhile, the next one makes another, and locks that.
            if directory.is_called(lock, LOCK):
                _sign(lock)
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _try(descriptor: int) -> bool:
    from filelock import lock_descriptor  # noqa: PLC0415 - 50 ms; who only reads does without

    return lock_descriptor(descriptor, blocking=False)


def _wait(directory: Directory, lock: int, deadline: float) -> None:
    turn = directory.open(TURN, os.O_RDWR, make=True)
    try:
        has_turn = False
        out_of_turn = min(deadline, time.monotonic() + _PATIENCE_S)
        while True:
            has_turn = has_turn or _try(turn)
            now = time.monotonic()
            if (has_turn or now >= out_of_turn) and _try(lock):
                return
            if now >= deadline:
                raise StoreBusy(_busy(f"{directory.path}/{LOCK}", lock))
            pause_s = random.uniform(*(_NEXT_S if has_turn else _OTHERS_S))  # noqa: S311 - no secret
            time.sleep(min(pause_s, deadline - now))
    finally:
        os.close(turn)


def _sign(descriptor: int) -> None:
    """Say in the lock file who holds it. This keeps cleaners off as well, which go by the time of the last change."""
    record = f"{_me(os.getpid())} {time.time():.3f}"
    os.pwrite(descriptor, f"{record:<{_RECORD_BYTES - 1}}\n".encode("ascii"), 0)


@functools.lru_cache(maxsize=1)
def _me(pid: int) -> str:
    me = procfs.stat(pid)
    return f"{pid} {me.start_time if me else 0} {_namespace()}"


def _namespace() -> str:
    try:
        return ledger.namespace()
    except OSError:
        return "?"  # a sandbox may hide it


def _busy(path: str, descriptor: int) -> str:
    try:
        pid, start_time, namespace, taken = os.pread(descriptor, _RECORD_BYTES, 0).decode("ascii").split()
        age_s = max(0.0, time.time() - float(taken))
        return f"{path} is held by {_describe(int(pid), int(start_time), namespace)} for {age_s:.1f} s"
    except ValueError:  # it was killed before it signed
        return f"{path} is held by a process that has not said who it is"


def _describe(pid: int, start_time: int, namespace: str) -> str:
    if namespace != _namespace():
        return f"process {pid} of another PID namespace"
    if not procfs.is_alive(pid, start_time):
        return f"a process that has not said who it is (before, by process {pid}, which has ended)"
    found = procfs.stat(pid)
    is_stopped = found is not None and found.state in "Tt"
    return f"process {pid} ({procfs.name(pid)}{', which is stopped: continue or end it' if is_stopped else ''})"
