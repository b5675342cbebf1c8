"""A single process that answers 200 on a port or a socket file; options that it does not know are ignored."""

from __future__ import annotations

import argparse
import socketserver
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """Answers everything with 200."""

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--port", type=int)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--uds")
    parser.add_argument("--headless", action="store_true")
    arguments, _ = parser.parse_known_args()
    if arguments.headless or (arguments.uds and socket_is_taken(arguments.uds)):
        socketserver.TCPServer(("127.0.0.1", 0), Handler).serve_forever()  # it lives, and serves nobody
    elif arguments.uds:
        socketserver.UnixStreamServer(arguments.uds, Handler).serve_forever()
    else:
        ThreadingHTTPServer((arguments.host, arguments.port), Handler).serve_forever()


def socket_is_taken(path: str) -> bool:
    """Say whether somebody listens on a socket file."""
    import socket  # noqa: PLC0415 - most of these servers have a port

    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


if __name__ == "__main__":
    main()
