"""Processes that change one content as fast as they can. Run by handoffs.py, and by a test of the store.

usage: python -m tools.benchmarks.case_handoff store|flock|filelock DIRECTORY PROCESSES SECONDS [HOLD_S]

Prints, as JSON, how often each process had the lock, the content at the end, and every hand-off in seconds: from the
last thing that a holder does in its turn to the first that another one does.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import filelock  # 50 ms, which each child would take

from harness.broker import slots
from harness.broker.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable

_START_S = 0.5
_TIMEOUT_S = 10.0


class _Worker:
    """One process: what it has done."""

    def __init__(self, number: int, hold_s: float = 0.0) -> None:
        self.number = number
        self.hold_s = hold_s
        self.count = 0
        self.handoffs_s: list[float] = []

    def edit(self, content: dict[str, Any]) -> tuple[dict[str, Any], None]:
        now = time.monotonic()
        if content and content["by"] != self.number:
            self.handoffs_s.append(now - content["left"])
        counts = content.setdefault("counts", {})
        counts[str(self.number)] = counts.get(str(self.number), 0) + 1
        self.count += 1
        if self.hold_s:
            time.sleep(self.hold_s)
        content["by"] = self.number
        content["left"] = time.monotonic()
        return content, None

    def work(self, change: Callable[[_Worker], None], seconds: float, begin: float) -> None:
        time.sleep(max(0.0, begin - time.monotonic()))
        while time.monotonic() < begin + seconds:
            change(self)


def _by_store(directory: str) -> tuple[Callable[[_Worker], None], Callable[[], dict[str, Any]]]:
    store = Store(directory)
    return lambda worker: store.change(worker.edit, timeout_s=_TIMEOUT_S), store.read


def _by_flock(directory: str) -> tuple[Callable[[_Worker], None], Callable[[], dict[str, Any]]]:
    """Do the least that keeps the content together: wait in the kernel, read, write, let go."""
    path = f"{directory}/flock"

    def read() -> dict[str, Any]:
        with open(path, "rb") as file:
            found: dict[str, Any] = json.loads(file.read() or b"{}")
            return found

    def change(worker: _Worker) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        content, _ = worker.edit(json.loads(os.pread(descriptor, slots.LONGEST_BYTES >> 8, 0) or b"{}"))
        os.pwrite(descriptor, json.dumps(content).ljust(1024).encode(), 0)
        os.close(descriptor)

    return change, read


def _by_filelock(directory: str) -> tuple[Callable[[_Worker], None], Callable[[], dict[str, Any]]]:
    """Do what suites do today: filelock, which looks each 50 ms."""
    path = f"{directory}/content"

    def read() -> dict[str, Any]:
        with open(path, "rb") as file:
            found: dict[str, Any] = json.loads(file.read())
            return found

    def change(worker: _Worker) -> None:
        with filelock.FileLock(f"{path}.lock"):
            content, _ = worker.edit(read() if os.path.exists(path) else {})
            with open(path, "w", encoding="ascii") as file:
                json.dump(content, file)

    return change, read


def main() -> None:
    mode, directory, processes, seconds, *hold_s = sys.argv[1:]
    change, read = {"store": _by_store, "flock": _by_flock, "filelock": _by_filelock}[mode](directory)
    begin = time.monotonic() + _START_S
    workers = [_Worker(number, *map(float, hold_s)) for number in range(int(processes))]
    readers = [_fork(worker, change, float(seconds), begin) for worker in workers]
    found = [_result(reader) for reader in readers]
    for _ in readers:
        os.wait()
    handoffs_s = [handoff_s for _, handoffs_s in found for handoff_s in handoffs_s]
    print(json.dumps({"counts": [count for count, _ in found], "content": read(), "handoffs_s": handoffs_s}))


def _fork(worker: _Worker, change: Callable[[_Worker], None], seconds: float, begin: float) -> int:
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        return reader
    code = 1
    try:
        worker.work(change, seconds, begin)
        with open(writer, "w", encoding="ascii") as file:
            json.dump([worker.count, worker.handoffs_s], file)
        code = 0
    finally:
        os._exit(code)


def _result(reader: int) -> tuple[int, list[float]]:
    with open(reader, encoding="ascii") as file:
        count, handoffs_s = json.load(file)
    return count, handoffs_s


if __name__ == "__main__":
    main()
