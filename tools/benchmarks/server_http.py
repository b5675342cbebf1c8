"""A server that answers 200 to everything, DELAY_S seconds after its start: PORT DELAY_S PATH.

It writes to PATH the time of the monotonic clock, which all processes share, at which it begins to listen.
"""

import signal
import socket
import sys
import time

_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def serve() -> None:
    """Wait, listen, answer."""
    signal.alarm(300)  # whatever becomes of who started it, it ends
    port, delay_s, path = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    with open(path, "w", encoding="ascii") as times:
        time.sleep(delay_s)
        listener.listen()
        times.write(repr(time.monotonic()))
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(_ANSWER)


serve()
