"""How a process of a trial tells the runner where it is, and waits for the runner's fault.

Each time a connection of its own, which is closed at once: no process of the product keeps a descriptor of this. What
cannot be said (no descriptor is left, say) is not said: the trial must not change what it looks at.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from typing import Any

SETTINGS = "HARNESS_CHAOS"
_WAIT_S = 4
_HOLD_S = 25


def settings() -> dict[str, Any]:
    """Give what the runner set for this trial."""
    found: dict[str, Any] = json.loads(os.environ[SETTINGS])
    return found


def reach(step: str) -> None:
    """Say that this process is at a step, and wait until the runner lets it go on (at most 4 s)."""
    _say({"step": step}, _WAIT_S)


def hold() -> None:
    """Say that the servers are up, and wait until the runner lets the test go on (at most 25 s)."""
    _say({"step": "the servers are up"}, _HOLD_S)


def tell(**facts: object) -> None:
    """Tell the runner something, and go on at once."""
    _say(facts, 0)


def _say(facts: dict[str, object], wait_s: int) -> None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        # A time-out of the kernel's: the socket stays blocking, and one system call waits.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", wait_s, 0))
        connection.connect(settings()["socket"])
        connection.sendall(json.dumps({"pid": os.getpid(), "waits": wait_s > 0, **facts}).encode() + b"\n")
        if wait_s:
            connection.recv(1)


def receive(connection: socket.socket) -> dict[str, Any]:
    """Read, in the runner, what a process says; nothing if it ends before it has said it."""
    data = b""
    with contextlib.suppress(OSError):
        while not data.endswith(b"\n"):
            part = connection.recv(4096)
            if not part:
                break
            data += part
    try:
        found: dict[str, Any] = json.loads(data)
    except ValueError:
        return {}  # it was killed half-way
    return found


def let_go(connection: socket.socket) -> None:
    """Let the process go on."""
    with contextlib.suppress(OSError):
        connection.send(b"g")
    connection.close()
