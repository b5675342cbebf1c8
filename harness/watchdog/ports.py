"""Ports that are held for a server's whole life.

A hold is a bound socket that never listens, with SO_REUSEADDR and SO_REUSEPORT: the kernel gives its port to nobody who
asks for any port, while a server that sets either option (asyncio, uvicorn, gunicorn, nginx, redis, Go and Rust do) can
bind and listen on it, and gets every connection. A server that binds with neither option is refused (EADDRINUSE).

Where there is IPv6 the socket is one that takes IPv4 as well: by a hold on 0.0.0.0 alone, another process may be given
the same port on ::1, where whoever connects to `localhost` looks first.
"""

from __future__ import annotations

import socket


class PortHolds:
    """The ports of one server, held until `close`."""

    def __init__(self, names: list[str]) -> None:
        """Hold one port for each name; raises OSError, holding none, if that fails."""
        self._sockets: list[socket.socket] = []
        self.ports: dict[str, int] = {}
        try:
            for name in names:
                self.ports[name] = self._hold()
        except OSError:
            self.close()
            raise

    def _hold(self) -> int:
        holder, address = _unbound()
        self._sockets.append(holder)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind((address, 0))
        port: int = holder.getsockname()[1]
        return port

    def close(self) -> None:
        """Give the ports back."""
        while self._sockets:
            self._sockets.pop().close()


def _unbound() -> tuple[socket.socket, str]:
    # Never listens; the address must cover every one that the server may choose.
    try:
        holder = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    except OSError:
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM), "0.0.0.0"  # noqa: S104 - see above
    holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    return holder, "::"
