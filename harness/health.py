"""The readiness check of the drop-ins: a GET to where the server was told to listen, which may be a socket file.

What answers must be the server itself or, for one that serves nothing (a headless node), another of its watchdog's.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

from harness import listeners
from harness.readiness import HttpOk, HttpProbe, Probe

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.server import Server

_HTTP_OK = 200
# On this machine a connection is taken or refused at once.
_CONNECT_S = 0.25
_CREDENTIALS = struct.Struct("iII")  # struct ucred, unix(7): pid, uid, gid


class Health(HttpOk):
    """Ready when GET on the path gives 200, from one of the processes that `owners` names.

    Either `uds` or `host` and `port` say where. `look` is called again and again, and raises why the server will never
    be ready. `headers` are whole lines, and are not shown.
    """

    def __init__(
        self,
        path: str,
        *,
        owners: Callable[[], list[int]],
        look: Callable[[], None],
        host: str = "",
        port: int | None = None,
        uds: str | None = None,
        headers: tuple[str, ...] = (),
    ) -> None:
        """Take where the server listens, and whose answer counts."""
        super().__init__(path, _HTTP_OK, port)
        self.host = host
        self.uds = uds
        self.owners = owners
        self.look = look
        self.headers = headers

    def forget(self) -> None:
        """Let go of who would be asked: a watchdog keeps its servers, and each of them its check."""
        self.owners = list
        self.look = _nothing

    def begin(self, server: Server) -> Probe:
        """Begin to probe a server."""
        return _SocketFileProbe(server, self) if self.uds is not None else _AddressProbe(server, self)


def _nothing() -> None:
    pass


class _HealthProbe(HttpProbe):
    def __init__(self, server: Server, check: Health) -> None:
        super().__init__(server, check)
        self.headers = check.headers
        self._health = check

    def step(self) -> bool:
        self._health.look()
        return super().step()


class _AddressProbe(_HealthProbe):
    @property
    def _address(self) -> tuple[str, int]:
        return (self._health.host, self._health.port or 0)

    @property
    def authority(self) -> str:
        host, port = self._address
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def connect(self) -> socket.socket | None:
        try:
            connection = socket.create_connection(self._address, _CONNECT_S)
        except OSError as error:
            self.seen = f"nothing answers at {self.authority}: {error.strerror or error}"
            return None
        if connection.getsockname() == connection.getpeername():  # it has met itself (TCP simultaneous open)
            connection.close()
            return None
        return connection

    def is_own(self) -> bool:
        host, port = self._address
        # Nobody listens there on this host: the address is another host's, whose processes cannot be known.
        if listeners.are_all_of(self._health.owners(), port, host) or not listeners.inodes(port, host):
            return True
        self.seen = f"a process that is not this server's answers on port {port}"
        return False


class _SocketFileProbe(_HealthProbe):
    _peer = 0

    @property
    def authority(self) -> str:
        return "localhost"

    def connect(self) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(_CONNECT_S)
        try:
            connection.connect(self._health.uds or "")
        except OSError as error:
            self.seen = f"nothing answers on {self._health.uds}: {error.strerror or error}"
            connection.close()
            return None
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self._peer = _CREDENTIALS.unpack(credentials)[0]
        return connection

    def is_own(self) -> bool:
        # Who has called listen(2), as the kernel has kept it; 0 for one of another PID namespace.
        if self._peer in {0, *self._health.owners()}:
            return True
        self.seen = f"a process that is not this server's (pid {self._peer}) listens on {self._health.uds}"
        return False
