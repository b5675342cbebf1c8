"""A small HTTP server that misbehaves as it is told: `web.py PORT BEHAVIOUR`. Run with `python -I -S`.

BEHAVIOUR: a status to answer every request with; `late` (503 three times, then 200); `silent` (never answers);
`garbage`; `closes` (hangs up without an answer); `drip` (sends a header's bytes one by one and never comes to an end);
`flood` (sends a body that has no end, as fast as it is taken); `second` (never answers the first connection, answers
all later ones).
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import time


def main() -> None:
    """Listen, and answer one connection after the other."""
    port, behaviour = int(sys.argv[1]), sys.argv[2]
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen()
    os.write(1, b"listening\n")
    kept = []
    for number in itertools.count():
        connection, _ = listener.accept()
        if behaviour == "silent" or (behaviour == "second" and number == 0):
            kept.append(connection)
        elif behaviour == "drip":
            send_for_ever(connection, b"HTTP/1.1 200 OK\r\nX: ", b"x", pause_s=0.1)
        elif behaviour == "flood":
            send_for_ever(connection, b"HTTP/1.1 200 OK\r\n\r\n", b"x" * (1 << 20), pause_s=0.0)
        else:
            answer(connection, behaviour, number)


def answer(connection: socket.socket, behaviour: str, number: int) -> None:
    """Read a request and answer it."""
    with connection:
        asked = connection.recv(65536)
        os.write(1, asked.split(b"\r\n")[0] + b"\n")
        if behaviour == "garbage":
            connection.sendall(b"\0\xff this is no HTTP \r\n\r\n")
        elif behaviour != "closes":
            words = {"late": "503" if number < 3 else "200", "second": "200"}
            status = words.get(behaviour, behaviour)
            connection.sendall(f"HTTP/1.1 {status} X\r\nContent-Length: 2\r\n\r\nok".encode())


def send_for_ever(connection: socket.socket, first: bytes, then: bytes, *, pause_s: float) -> None:
    """Send an answer that never comes to an end."""
    try:
        connection.sendall(first)
        while True:
            connection.sendall(then)
            time.sleep(pause_s)  # the slowness is what `drip` is about
    except OSError:
        connection.close()


if __name__ == "__main__":
    main()
