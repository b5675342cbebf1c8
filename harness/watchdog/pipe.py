"""The watchdog's end of the Pipe.

It never blocks: neither on a frame that comes in pieces, nor on a client that does not read.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque

from harness import frames

_READ_BYTES = 1 << 18


class PipeEnd:
    """Requests in, replies out, over one non-blocking file descriptor."""

    def __init__(self, descriptor: int) -> None:
        """Take the file descriptor, which is made non-blocking."""
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor
        self._read = b""
        self._assembler = frames.Assembler()
        self._unsent: deque[bytes] = deque()
        self.unsent_bytes = 0

    def receive(self) -> list[tuple[int, bytes]]:
        """Give the messages that are complete; raises EOFError at the end, FrameError for what is no frame."""
        try:
            data = os.read(self.descriptor, _READ_BYTES)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            data = b""
        if not data:
            raise EOFError
        chunks, used = frames.parse(self._read + data)
        self._read = (self._read + data)[used:]
        messages = [(chunk.message_id, self._assembler.add(chunk)) for chunk in chunks]
        return [(message_id, message) for message_id, message in messages if message is not None]

    def send(self, message_id: int, message: bytes) -> None:
        """Queue a message and send what the client's buffer takes."""
        parts = frames.split(message_id, message)
        self._unsent.extend(parts)
        self.unsent_bytes += sum(map(len, parts))
        self.flush()

    def flush(self) -> None:
        """Send what the client's buffer takes now."""
        try:
            while self._unsent:
                written = os.write(self.descriptor, self._unsent[0])
                self.unsent_bytes -= written
                rest = self._unsent.popleft()[written:]
                if rest:
                    self._unsent.appendleft(rest)
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            self._unsent.clear()
            self.unsent_bytes = 0

    def finish(self, timeout_s: float) -> None:
        """Send everything to a client that reads; a client that does not loses it after that time."""
        poll = select.poll()
        poll.register(self.descriptor, select.POLLOUT)
        deadline = time.monotonic() + timeout_s
        self.flush()
        while self._unsent and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            self.flush()
