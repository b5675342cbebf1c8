"""The watchdog's end of its broker: start it at the first lease, send it orders, take its reports, see its end."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from harness import messages
from harness.lease_messages import LeaseOrder, LeaseStatus
from harness.watchdog import events
from harness.watchdog.leases import BROKER_ANSWER_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from harness.messages import BrokerOrder

_BOOT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "broker", "boot.py")
_MESSAGE_BYTES = 1 << 18
# The broker's descriptor of the socket.
_SOCKET = 3
# Without leases it ends in some 10 ms.
_END_S = 1.0
_END_POLL_S = 0.002
# Some 280 orders have room in the socket.
_AGAIN_S = 0.01


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
        self._store = ""
        self._pid: int | None = None
        self._unreaped: set[int] = set()
        self._unsent: list[bytes] = []
        self._unsent_since = 0.0

    @property
    def pids(self) -> frozenset[int]:
        """Give the brokers that have not been reaped: they are no orphans."""
        return frozenset(self._unreaped)

    @property
    def deadline(self) -> float | None:
        """Give when `see_time` has to be called next, or None."""
        return time.monotonic() + _AGAIN_S if self._unsent else None

    def see_time(self, now: float) -> None:
        """Send what there was no room for; a broker that has not read for long is stopped, and is ended."""
        self._flush()
        if self._unsent and now - self._unsent_since > BROKER_ANSWER_S:
            self.kill()

    def send(self, order: BrokerOrder) -> None:
        """Send an order; the one that asks for a lease starts a broker if there is none."""
        if isinstance(order, LeaseOrder):
            if self._socket is None:
                self._start_for(order)
            elif order.request.store != self._store:
                text = f"this watchdog's leases are in {self._store}, and not in {order.request.store}"
                self._tell(events.BrokerSaid(LeaseStatus(order.lease, "refused", text, [])))
                return
        if self._socket is None:
            return  # its broker has died, and whoever waited for it has been told
        if not self._unsent:
            self._unsent_since = time.monotonic()
        self._unsent.append(messages.pack(order))
        self._flush()

    def _start_for(self, order: LeaseOrder) -> None:
        try:
            self._start(order)
        except OSError as error:
            self._tell(events.BrokerLost(f"the broker of GPUs cannot be started: {error.strerror}"))

    def _flush(self) -> None:
        while self._unsent and self._socket is not None:
            try:
                self._socket.send(self._unsent[0])
            except BlockingIOError:
                return
            except OSError:
                self.kill()  # it is dead already, which is seen soon, or what it is sent is too long for a message
                return
            del self._unsent[0]
            self._unsent_since = time.monotonic()

    def kill(self) -> None:
        """End the broker, which is of no use: what it had leased is judged by the next one."""
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)  # it has not been reaped, so the number is its own

    def _start(self, order: LeaseOrder) -> None:
        import socket  # noqa: PLC0415 - an idle watchdog does without: 0.3 MiB

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
        ours.setblocking(False)
        self._unreaped.add(self._pid)
        self._socket, self._store, self._unsent = ours, order.request.store, []
        self._watch(ours.fileno(), self._read)

    def _read(self) -> None:
        while self._socket is not None:
            try:
                data = self._socket.recv(_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # it ended with an order unread: the kernel says so once, before it gives the last reports
            except OSError:
                data = b""
            if not data:
                self._lose()
                return
            self._tell(events.BrokerSaid(messages.unpack(data)))  # type: ignore[arg-type]  # a broker sends only those

    def reaped(self, pid: int) -> bool:
        """Say whether this child was a broker; the end of the present one is told then."""
        if pid not in self._unreaped:
            return False
        self._unreaped.discard(pid)
        if pid == self._pid:
            self._pid = None  # first: nothing below may signal the number, which is not its own any more
            self._read()
            self._lose()
        return True

    def _lose(self) -> None:
        if self._socket is None:
            return
        self._forget(self._socket.fileno())
        self._socket.close()
        self._socket, self._unsent = None, []
        self.kill()  # one that has closed its socket is of no use
        self._pid = None
        self._tell(events.BrokerLost("the broker of GPUs has died: what it had leased is judged by the next one"))

    def end(self) -> None:
        """Let go of the broker, and give it a moment to end; one that still waits for memory goes on by itself."""
        if self._socket is None or self._pid is None:
            return
        self._socket.close()
        deadline = time.monotonic() + _END_S
        while time.monotonic() < deadline and os.waitpid(self._pid, os.WNOHANG)[0] == 0:
            time.sleep(_END_POLL_S)  # nothing else is left to be done in this process
