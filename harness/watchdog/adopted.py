"""A server that the test process started itself: watched and stopped, but with no keeper.

Its tree is not re-parented to the watchdog, so this is best effort: the tree is looked up when it is adopted, asked and
killed, each member is held by a pidfd, and a daemon that left the tree before it was seen is not found. Its exit code
belongs to its parent, the test process, which alone can reap it.
"""

from __future__ import annotations

import os
import signal

from harness import procfs
from harness.messages import Adopt, Survivor


class Adopted:
    """One adopted server."""

    def __init__(self, key: int, adopt: Adopt) -> None:
        """Open the root and its tree; raises ProcessLookupError if it is not there any more."""
        self.key = key
        self.name = adopt.name
        self.root = adopt.pid
        self.pidfds: dict[int, int] = {}
        self._asked: set[int] = set()
        self.is_asking = False
        if not self._open(adopt.pid, start_time=adopt.start_time):
            raise ProcessLookupError(f"there is no process {adopt.pid} any more")
        self.look()

    @property
    def root_is_gone(self) -> bool:
        """Say whether the root has exited."""
        return self.root not in self.pidfds

    def look(self) -> None:
        """Find members of the tree that are not known yet."""
        queue = list(self.pidfds)
        while queue:
            parent = queue.pop()
            for pid in procfs.children(parent):
                if pid not in self.pidfds and self._open(pid, parent=parent):
                    queue.append(pid)  # noqa: PERF401 - the queue grows while it is read

    def _open(self, pid: int, *, parent: int | None = None, start_time: int | None = None) -> bool:
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:
            return False
        found = procfs.stat(pid)
        is_ours = found is not None and (found.start_time == start_time or self._is_child(found, parent))
        if found is None or found.state in "ZX" or not is_ours:
            os.close(descriptor)
            return False
        self.pidfds[pid] = descriptor
        return True

    def _is_child(self, found: procfs.Stat, parent: int | None) -> bool:
        # The parent's number may have been given away: the parent must be there after the child was looked at.
        if parent is None or found.parent != parent:
            return False
        try:
            signal.pidfd_send_signal(self.pidfds[parent], 0)
        except OSError:
            return False
        return True

    def ask(self) -> None:
        """Send SIGTERM to the root or, if it has gone, to what it left; to each once."""
        self.is_asking = True
        self.look()
        for pid in list(self.pidfds) if self.root_is_gone else [self.root]:
            if pid not in self._asked:
                self._asked.add(pid)
                self.send(pid, signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to every member that can be found."""
        self.look()
        for pid in list(self.pidfds):
            self.send(pid, signal.SIGKILL)

    def send(self, pid: int, number: int) -> None:
        """Send a signal to one member, if it still lives."""
        try:
            signal.pidfd_send_signal(self.pidfds[pid], number)
        except (KeyError, ProcessLookupError, PermissionError):
            return

    def forget(self, pid: int) -> None:
        """Close the pidfd of a member that has exited."""
        os.close(self.pidfds.pop(pid))

    def survivors(self) -> list[Survivor]:
        """Describe the members that are alive."""
        found = [stat for stat in map(procfs.stat, self.pidfds) if stat is not None]
        return [Survivor(s.pid, s.state, procfs.wait_channel(s.pid), procfs.command_line(s.pid)[:200]) for s in found]
