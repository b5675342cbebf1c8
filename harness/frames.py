"""The frames that cross the Pipe: pure bytes in, bytes out.

A message is cut into chunks, and each chunk becomes one frame in the format of `multiprocessing.connection` (a signed
32-bit length in network order, then that many bytes). A frame is small enough for the kernel to take it whole or not
at all: Linux puts up to 36,544 bytes of a write to a Unix stream socket into one buffer of its own, and cuts only
larger writes between two of them (seen on 6.18). So a process that is stopped or interrupted between two system calls
never leaves half a frame behind.
"""

from __future__ import annotations

import struct

from harness.records import Record, Sealed

_LENGTH = struct.Struct("!i")
_HEADER = struct.Struct("!IHH")
CHUNK_BYTES = 32_000
MESSAGE_BYTES = 8 << 20
UNFINISHED_MESSAGES = 64
# Two messages of the largest size: a sender that begins more and ends none is broken, and must not fill the memory.
UNFINISHED_BYTES = 2 * MESSAGE_BYTES


class FrameError(ValueError):
    """The peer sent bytes that are not frames, or more of them than a message may have."""


class Chunk(Record):
    """One part of a message: the message's id, which part of how many, and its bytes."""

    message_id: int
    part: int
    parts: int
    data: bytes


def split(message_id: int, message: bytes) -> list[bytes]:
    """Cut a message into frames; raises FrameError if it is larger than 8 MiB."""
    if len(message) > MESSAGE_BYTES:
        raise FrameError(f"a message of {len(message)} bytes: the limit is {MESSAGE_BYTES}")
    sealed = Sealed(message)
    parts = [sealed[at : at + CHUNK_BYTES] for at in range(0, len(sealed), CHUNK_BYTES)] or [sealed]
    return [_frame(Chunk(message_id, index, len(parts), data)) for index, data in enumerate(parts)]


def _frame(chunk: Chunk) -> bytes:
    header = _HEADER.pack(chunk.message_id, chunk.part, chunk.parts)
    return Sealed(_LENGTH.pack(len(header) + len(chunk.data)) + header + chunk.data)


def parse(data: bytes) -> tuple[list[Chunk], int]:
    """Give the whole frames at the start of `data`, and how many bytes they are."""
    chunks: list[Chunk] = []
    at = 0
    while len(data) - at >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(data, at)
        if not _HEADER.size <= length <= _HEADER.size + CHUNK_BYTES:
            raise FrameError(f"a frame of {length} bytes")
        end = at + _LENGTH.size + length
        if end > len(data):
            break
        chunks.append(_chunk(data[at + _LENGTH.size : end]))
        at = end
    return chunks, at


def _chunk(body: bytes) -> Chunk:
    message_id, index, count = _HEADER.unpack_from(body)
    if index >= count or count > MESSAGE_BYTES // CHUNK_BYTES + 1:
        raise FrameError(f"chunk {index} of {count}")
    return Chunk(message_id, index, count, body[_HEADER.size :])


class Assembler:
    """Puts the chunks of messages together again, also when those of several messages come mixed.

    A message whose sender gave up half-way is forgotten after some others have begun, the oldest first: at most 64
    messages and 16 MiB are held.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._parts: dict[int, dict[int, bytes]] = {}
        self._held_bytes = 0

    def add(self, chunk: Chunk) -> bytes | None:
        """Take a chunk; give the message if it is complete now."""
        parts = self._parts.setdefault(chunk.message_id, {})
        self._held_bytes += len(chunk.data) - len(parts.get(chunk.part, b""))
        parts[chunk.part] = chunk.data
        if len(parts) == chunk.parts:
            self._forget(chunk.message_id)
            return b"".join(parts[index] for index in sorted(parts))
        while len(self._parts) > UNFINISHED_MESSAGES or self._held_bytes > UNFINISHED_BYTES:
            self._forget(next(iter(self._parts)))
        return None

    def _forget(self, message_id: int) -> None:
        self._held_bytes -= sum(map(len, self._parts.pop(message_id).values()))
