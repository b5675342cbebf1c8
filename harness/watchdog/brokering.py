"""The watchdog's end of its broker: start it at the first lease, send it orders, take its reports, see its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time

from harness import messages
from harness.lease_messages import LeaseOrder
from harness.watchdog import events

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.messages import BrokerOrder

_BOOT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "broker", "boot.py")
_MESSAGE_BYTES = 1 << 18
# The broker's descriptor of the socket.
_SOCKET = 3
# Without leases it ends in some 10 ms.
_END_S = 1.0
_END_POLL_S = 0.002


class Brokering:
    """At most one broker, a child of this process."""

    def __init__(
        self,
        watch: Callable[[int, Callable[[], None]], None],
        forget: Callable[[int], None],
        tell: Callable[[events.Event], None],
        *,
        log: str,
    ) -> None:
        """Take the loop's means, and the path of the watchdog's log."""
        self._watch = watch
        self._forget = forget
        self._tell = tell
        self._log = log
        self._socket: socket.socket | None = None
        self._pid: int | None = None

    @property
    def pids(self) -> frozenset[int]:
        """Give the broker's pid, if there is one: it is no orphan."""
        return frozenset() if self._pid is None else frozenset({self._pid})

    def send(self, order: BrokerOrder) -> None:
        """Send an order; the one that asks for a lease starts a broker if there is none."""
        if self._socket is None:
            if not isinstance(order, LeaseOrder):
                return  # its broker has died, and whoever waited for it has been told
            try:
                self._start(order)
            except OSError as error:
                self._tell(events.BrokerLost(f"the broker of GPUs cannot be started: {error.strerror}"))
                return
        self._deliver(order)

    def _deliver(self, order: BrokerOrder) -> None:
        if self._socket is None:
            return
        try:
            self._socket.send(messages.pack(order), socket.MSG_DONTWAIT)
        except OSError:
            self._kill()  # dead, or stopped for so long that its orders fill the socket: its end is seen soon

    def _kill(self) -> None:
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)  # it has not been reaped, so the number is its own

    def _start(self, order: LeaseOrder) -> None:
        config = {
            "socket": _SOCKET,
            "watchdog": os.getpid(),
            "store": order.request.store,
            "is_shared": order.request.is_shared,
            "paths": order.request.paths,
            "log": self._log,
        }
        flags = ["-I", *(["-S"] if sys.flags.no_site else []), "-X", f"utf8={sys.flags.utf8_mode}"]
        program = [sys.executable, *flags, _BOOT, json.dumps(config)]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            actions = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), _SOCKET)]
            self._pid = os.posix_spawn(program[0], program, os.environ, file_actions=actions, setsigmask=())
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._socket = ours
        self._watch(ours.fileno(), self._read)

    def _read(self) -> None:
        while self._socket is not None:
            try:
                data = self._socket.recv(_MESSAGE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._lose()
                return
            self._tell(events.BrokerSaid(messages.unpack(data)))  # type: ignore[arg-type]  # a broker sends only those

    def reaped(self, pid: int) -> bool:
        """Say whether this child was the broker, whose end is told then."""
        if pid != self._pid:
            return False
        self._read()
        self._pid = None
        self._lose()
        return True

    def _lose(self) -> None:
        if self._socket is None:
            return
        self._forget(self._socket.fileno())
        self._socket.close()
        self._socket = None
        self._kill()  # one that has closed its socket is of no use
        self._tell(events.BrokerLost("the broker of GPUs has died: what it had leased is judged by the next one"))

    def end(self) -> None:
        """Let go of the broker, and give it a moment to end; one that still waits for memory goes on by itself."""
        if self._socket is None or self._pid is None:
            return
        self._socket.close()
        deadline = time.monotonic() + _END_S
        while time.monotonic() < deadline and os.waitpid(self._pid, os.WNOHANG)[0] == 0:
            time.sleep(_END_POLL_S)  # nothing else is left to be done in this process
