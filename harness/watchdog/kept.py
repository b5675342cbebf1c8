"""The watchdog's end of a keeper: fork it, read its reports, give it orders, signal its root."""

from __future__ import annotations

import gc
import os
import signal
import socket
import struct

from harness import messages, procfs, templates
from harness.watchdog import keeper, limits
from harness.watchdog.ledger import MARK
from harness.watchdog.ports import PortHolds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from harness.messages import Launch
    from harness.watchdog.ledger import Entry, Ledger
    from harness.watchdog.log import Log

_MESSAGE_BYTES = 1 << 16
_INT = struct.Struct("i")
_RIGHTS_BYTES = socket.CMSG_SPACE(_INT.size)
_UNSENDABLE = (ProcessLookupError, PermissionError)


class Kept:
    """One server that has a keeper."""

    def __init__(self, key: int, launch: Launch, log: Log, ledger: Ledger, *, crash_grace_s: float) -> None:
        """Hold the ports, record the server and fork the keeper; raises OSError, with nothing held, if that fails."""
        self.key = key
        self.name = launch.name
        self._holds = PortHolds(["", *launch.ports], launch.port or 0, launch.host)
        self.ports = self._holds.ports
        self._root_pidfd: int | None = None
        self.root = 0
        self.is_empty = False
        self.is_hung_up = False
        self._asks_root = launch.ask == "root"
        self._entry = ledger.open(key, launch)
        try:
            filled = _filled(launch, self.ports, self._entry.mark)
            self.control, self.pid = _fork(filled, log, self._entry, crash_grace_s)
        except BaseException:
            self._holds.close()
            self._entry.remove()
            raise
        finally:
            self._entry.close()

    def read(self) -> messages.Message | None:
        """Read one report; None if there is none now, or (`is_hung_up`) will be none any more."""
        try:
            data, rights, _, _ = self.control.recvmsg(_MESSAGE_BYTES, _RIGHTS_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            # It ended with an order unread: the kernel says so once, before it gives the keeper's last reports.
            return self.read()
        except OSError:
            data, rights = b"", []
        self.is_hung_up = not data
        for _, _, descriptor in rights:
            (self._root_pidfd,) = _INT.unpack(descriptor)
        return messages.unpack(data) if data else None

    def order(self, order: messages.Order) -> None:
        """Give the keeper an order. One that is dead or too full to hear is dealt with by the supervisor's deadline."""
        try:
            self.control.send(messages.pack(order), socket.MSG_DONTWAIT)
        except OSError:
            return

    def root_started(self, pid: int) -> int:
        """Take note of the root, and give its start time; 0 if it has exited already."""
        self.root = pid
        found = procfs.stat(pid)
        # Alive after its stat was read, it was alive when that was read, and the number was its own.
        return found.start_time if found is not None and self._root_is_alive() else 0

    def _root_is_alive(self) -> bool:
        try:
            signal.pidfd_send_signal(-1 if self._root_pidfd is None else self._root_pidfd, 0)
        except PermissionError:
            return True  # a set-user-ID program
        except OSError:
            return False
        return True

    def ask_root(self) -> bool:
        """Send SIGTERM to the root at once, if that is how this server is asked; False leaves it to the keeper."""
        return self._asks_root and self.signal_root(signal.SIGTERM)

    def signal_root(self, number: int) -> bool:
        """Send a signal to the root; False if this process cannot, and the keeper has to."""
        if self._root_pidfd is None:
            return False
        try:
            signal.pidfd_send_signal(self._root_pidfd, number)
        except _UNSENDABLE:
            return True  # it has exited, or belongs to another user: the keeper could not do more
        return True

    def end_keeper(self) -> None:
        """Kill the keeper, which the watchdog has not reaped, so its number is its own."""
        os.kill(self.pid, signal.SIGKILL)

    def note_orphans(self, pids: Iterable[int]) -> None:
        """Record what this server's keeper, which has died, may have left."""
        self._entry.note_members(pids)

    def kill_cgroup(self) -> None:
        """Send SIGKILL to all that is in the server's cgroup: exactly its own, whoever keeps it."""
        self._entry.kill()

    def release(self) -> None:
        """Give back the ports and every descriptor but the control socket, which ends with the keeper."""
        self._holds.close()
        if not self.is_empty:
            self._entry.remove()  # its keeper has not done it
        if self._root_pidfd is not None:
            os.close(self._root_pidfd)
            self._root_pidfd = None


def _filled(launch: Launch, ports: dict[str, int], mark: str) -> Launch:
    values = templates.Values(ports, launch.name, launch.log_dir)
    environment = {**launch.environment, MARK: mark}
    for name in launch.templated:
        environment[name] = templates.fill(environment[name], values)
    if not launch.is_literal:
        launch = launch.replaced(command=[templates.fill(argument, values) for argument in launch.command])
    return launch.replaced(environment=environment)


def _fork(launch: Launch, log: Log, entry: Entry, crash_grace_s: float) -> tuple[socket.socket, int]:
    watchdog = os.getpid()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Until the child ignores it, SIGTERM to it would be taken for one to the watchdog: they share the wake-up pipe.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    gc.freeze()  # a collection in the keeper would touch, and so copy, every page that holds objects
    try:
        limits.check_descriptor(theirs.fileno())
        pid = os.fork()
        if pid == 0:
            keeper.run(launch, theirs, watchdog, log, entry, crash_grace_s=crash_grace_s)
    except OSError:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        theirs.close()
    return ours, pid
