"""Ports that are held for a server's whole life.

A hold is a bound socket that never listens, with SO_REUSEADDR and SO_REUSEPORT: the kernel gives its port to nobody who
asks for any port, while a server that sets either option (asyncio, uvicorn, gunicorn, nginx, redis, Go and Rust do) can
bind and listen on it, and gets every connection. A server that binds with neither option is refused (EADDRINUSE).

Where there is IPv6 the socket is one that takes IPv4 as well: by a hold on 0.0.0.0 alone, another process may be given
the same port on ::1, where whoever connects to `localhost` looks first.
"""

from __future__ import annotations

import contextlib
import socket


class PortHolds:
    """The ports of one server, held until `close`."""

    def __init__(self, names: list[str], main: int = 0, host: str = "") -> None:
        """Hold one port for each name; raises OSError, holding none, if that fails.

        For "" it is this `main` one, on `host` alone if that is an address.
        """
        self._sockets: list[socket.socket] = []
        self.ports: dict[str, int] = {}
        try:
            for name in names:
                self.ports[name] = self._hold(*((0, "") if name else (main, host)))
        except OSError:
            self.close()
            raise

    def _hold(self, wanted: int, host: str) -> int:
        holder, address = _unbound(host)
        self._sockets.append(holder)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            holder.bind((address, wanted))
        except OSError as error:
            raise OSError(error.errno, f"port {wanted}: {error.strerror}" if wanted else error.strerror) from None
        port: int = holder.getsockname()[1]
        return port

    def close(self) -> None:
        """Give the ports back."""
        while self._sockets:
            self._sockets.pop().close()


def _unbound(host: str) -> tuple[socket.socket, str]:
    # Never listens; without a host the address must cover every one that the server may choose.
    for family in (socket.AF_INET, socket.AF_INET6) if host else ():
        with contextlib.suppress(OSError):
            socket.inet_pton(family, host)
            return socket.socket(family, socket.SOCK_STREAM), host
    try:
        holder = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    except OSError:
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM), "0.0.0.0"  # noqa: S104 - see above
    holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    return holder, "::"
