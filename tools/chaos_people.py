"""Who is who among the processes of a trial: pytest, its workers, their watchdogs, and the keepers."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

from harness import procfs
from tools.chaos_steps import KEEPER, PYTEST, WATCHDOG, WORKER

if TYPE_CHECKING:
    from collections.abc import Callable

_BOOT = "chaos_boot.py"
_BYSTANDER = "chaos_bystander.py"


class Person:
    """One process, held by a pidfd."""

    def __init__(self, pid: int, role: str) -> None:
        """Open the pidfd; raises ProcessLookupError."""
        self.pid = pid
        self.role = role
        self.pidfd = os.pidfd_open(pid)

    def send(self, number: int) -> None:
        """Send a signal, if it still lives."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def close(self) -> None:
        """Let go of it."""
        os.close(self.pidfd)


class People:
    """Finds the processes that a fault is for."""

    def __init__(self, pytest: int, *, has_workers: bool, is_ours: Callable[[int], bool]) -> None:
        """Take pytest's pid, whether it is an xdist controller, and what says whether a process is of the trial."""
        self._pytest = pytest
        self._has_workers = has_workers
        self._is_ours = is_ours
        self.test_processes: set[int] = {pytest}
        self._has_said_hello: set[int] = set()

    def find(self, role: str, near: int | None, choice: int) -> Person | None:
        """Find a process of a role, None if there is none; of the family of `near`, if that has one."""
        found = self._family(role, near) or self._everyone(role)
        if not found:
            return None
        try:
            person = Person(found[choice % len(found)], role)
        except ProcessLookupError:
            return None
        # The number was found before its pidfd was opened: it may have changed hands.
        if person.pid not in self._everyone(role):
            person.close()
            return None
        return person

    def hear_hello(self, pid: int) -> None:
        """Take note of a test process that is about to fork its watchdog, and has nothing else to fork."""
        self.test_processes.add(pid)
        self._has_said_hello.add(pid)

    def client_of(self, watchdog: int) -> int | None:
        """Give the test process of a watchdog."""
        found = procfs.stat(watchdog)
        return found.parent if found is not None and found.parent in self.test_processes else None

    def _everyone(self, role: str) -> list[int]:
        if role == PYTEST:
            return [self._pytest]
        clients = self._clients()
        if role == WORKER:
            return clients
        watchdogs = [pid for client in clients for pid in self._watchdogs(client)]
        if role == WATCHDOG:
            return watchdogs
        return [pid for watchdog in watchdogs for pid in self._keepers(watchdog)]

    def _family(self, role: str, near: int | None) -> list[int]:
        # Upwards from `near`, the first that has such a relative; itself if it is one.
        pid = near
        while pid is not None and pid != self._pytest:
            found = procfs.stat(pid)
            below = [pid] if pid in self._everyone(role) else self._below(role, pid)
            if below or found is None or pid in self.test_processes:
                return below
            pid = found.parent if found.parent > 1 else None
        return []

    def _below(self, role: str, pid: int) -> list[int]:
        watchdogs = self._watchdogs(pid) if pid in self.test_processes else [pid]
        if role == WATCHDOG:
            return watchdogs if pid in self.test_processes else []
        is_above = pid in self.test_processes or pid in self._everyone(WATCHDOG)
        return (
            [keeper for watchdog in watchdogs for keeper in self._keepers(watchdog)]
            if is_above and role == KEEPER
            else []
        )

    def _clients(self) -> list[int]:
        if not self._has_workers:
            return [self._pytest] if self._pytest in self._has_said_hello else []
        return sorted(pid for pid in self._has_said_hello if pid != self._pytest and self._is_ours(pid))

    def _watchdogs(self, client: int) -> list[int]:
        found = [pid for pid in procfs.children(client) if self._is_ours(pid) and pid not in self.test_processes]
        return [pid for pid in found if _BYSTANDER not in procfs.command_line(pid)]

    def _keepers(self, watchdog: int) -> list[int]:
        return [pid for pid in procfs.children(watchdog) if _BOOT in procfs.command_line(pid)]
