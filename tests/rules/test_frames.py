"""Frames: what is split comes together again, however it is cut, mixed or broken."""

from __future__ import annotations

import multiprocessing
import os
import struct

import pytest

from harness.frames import (
    CHUNK_BYTES,
    MESSAGE_BYTES,
    UNFINISHED_BYTES,
    UNFINISHED_MESSAGES,
    Assembler,
    Chunk,
    FrameError,
    parse,
    split,
)
from harness.records import Sealed

HEADER_BYTES = 8
SIZES = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, MESSAGE_BYTES]


def read(pieces: list[bytes]) -> list[tuple[int, bytes]]:
    """Give the messages in a stream that arrives in these pieces."""
    assembler = Assembler()
    messages: list[tuple[int, bytes]] = []
    unread = b""
    for piece in pieces:
        unread += piece
        chunks, used = parse(unread)
        unread = unread[used:]
        found = [(chunk.message_id, assembler.add(chunk)) for chunk in chunks]
        messages += [(message_id, message) for message_id, message in found if message is not None]
    assert unread == b""
    return messages


@pytest.mark.parametrize("size", SIZES)
def test_a_message_of_any_size_comes_back(size: int) -> None:
    message = bytes(range(256)) * (size // 256 + 1)
    frames = split(7, message[:size])
    assert read(frames) == [(7, message[:size])]
    assert max(map(len, frames)) <= 4 + HEADER_BYTES + CHUNK_BYTES


def test_a_message_over_the_limit_is_refused() -> None:
    with pytest.raises(FrameError, match=str(MESSAGE_BYTES + 1)):
        split(1, bytes(MESSAGE_BYTES + 1))


def test_a_stream_can_be_cut_at_every_byte() -> None:
    expected = [(1, b"one"), (2, b""), (4_000_000_000, b"three")]
    stream = b"".join(frame for message_id, message in expected for frame in split(message_id, message))
    for cut in range(len(stream) + 1):
        assert read([stream[:cut], stream[cut:]]) == expected
    assert read([bytes([byte]) for byte in stream]) == expected


def test_a_stream_of_long_messages_can_be_cut_around_every_boundary() -> None:
    frames = split(5, b"x" * (2 * CHUNK_BYTES + 1))
    stream = b"".join(frames)
    ends = [sum(map(len, frames[:count])) for count in range(len(frames) + 1)]
    for cut in {end + delta for end in ends for delta in range(-5, 13) if 0 <= end + delta <= len(stream)}:
        assert read([stream[:cut], stream[cut:]]) == [(5, b"x" * (2 * CHUNK_BYTES + 1))]


def test_the_chunks_of_several_messages_may_come_mixed() -> None:
    first, second = split(1, b"a" * (CHUNK_BYTES + 1)), split(2, b"b" * (2 * CHUNK_BYTES))
    mixed = [first[0], second[1], *split(3, b"c"), second[0], first[1]]
    assert read(mixed) == [(3, b"c"), (2, b"b" * (2 * CHUNK_BYTES)), (1, b"a" * (CHUNK_BYTES + 1))]


@pytest.mark.parametrize("length", [-1, -(2**31), 0, HEADER_BYTES - 1, HEADER_BYTES + CHUNK_BYTES + 1, 2**31 - 1])
def test_a_frame_of_an_impossible_length_is_refused_at_once(length: int) -> None:
    with pytest.raises(FrameError, match=str(length)):
        parse(struct.pack("!i", length))


@pytest.mark.parametrize(("part", "parts"), [(0, 0), (1, 1), (2, 1), (0, 65535)])
def test_an_impossible_chunk_is_refused(part: int, parts: int) -> None:
    with pytest.raises(FrameError, match=f"{part} of {parts}"):
        parse(struct.pack("!iIHH", HEADER_BYTES, 1, part, parts))


def test_a_message_that_was_given_up_is_forgotten_after_some_others() -> None:
    assembler = Assembler()
    for message_id in range(UNFINISHED_MESSAGES + 1):
        assert assembler.add(Chunk(message_id, 0, 2, b"begin ")) is None
    assert assembler.add(Chunk(1, 1, 2, b"end")) == b"begin end"
    assert assembler.add(Chunk(0, 1, 2, b"end")) is None


def test_messages_without_an_end_are_forgotten_by_their_size_too() -> None:
    assembler = Assembler()
    count = UNFINISHED_BYTES // CHUNK_BYTES
    for part in range(count):
        assert assembler.add(Chunk(part % 3, part // 3, 60_000, bytes(CHUNK_BYTES))) is None
    for _ in range(3):  # the same part again takes no more room
        assembler.add(Chunk(0, 0, 60_000, bytes(CHUNK_BYTES)))
    assembler.add(Chunk(7, 0, 2, b"begin "))
    assert assembler.add(Chunk(7, 1, 2, b"end")) == b"begin end"
    assembler.add(Chunk(8, 0, 2, bytes(CHUNK_BYTES)))  # the first is given up for this one, and makes room for more
    for message_id in (1, 2):
        assert assembler.add(Chunk(message_id, 59_999, 60_000, b"")) is None
    for message_id in range(10, 20):
        assert assembler.add(Chunk(message_id, 0, 2, bytes(CHUNK_BYTES))) is None
    assert assembler.add(Chunk(8, 1, 2, b"")) == bytes(CHUNK_BYTES)


def test_a_frame_does_not_show_what_it_holds() -> None:
    (frame,) = split(7, b"secret")
    assert b"secret" in frame
    assert "secret" not in repr([frame, frame[:-1], parse(frame[:3])])
    assert "secret" not in repr(Sealed(b"secret"))
    assert Sealed(b"secret")[0] == ord("s")


def test_messages_that_are_complete_do_not_push_out_others() -> None:
    assembler = Assembler()
    assembler.add(Chunk(0, 0, 2, b"begin "))
    for message_id in range(1, 2 * UNFINISHED_MESSAGES):
        assert assembler.add(Chunk(message_id, 0, 1, b"whole")) == b"whole"
    assert assembler.add(Chunk(9_999, 0, 2, b"")) is None
    assert assembler.add(Chunk(0, 1, 2, b"end")) == b"begin end"


def test_a_chunk_that_comes_twice_does_no_harm() -> None:
    assembler = Assembler()
    assert assembler.add(Chunk(1, 0, 2, b"a")) is None
    assert assembler.add(Chunk(1, 0, 2, b"a")) is None
    assert assembler.add(Chunk(1, 1, 2, b"b")) == b"ab"


@pytest.mark.parametrize("size", [0, 3, CHUNK_BYTES])
def test_multiprocessing_reads_a_frame_as_one_message(size: int) -> None:
    reader, writer = multiprocessing.Pipe()
    with reader, writer:
        (frame,) = split(9, b"x" * size)
        assert os.write(writer.fileno(), frame) == len(frame)
        assert reader.recv_bytes() == struct.pack("!IHH", 9, 0, 1) + b"x" * size
        writer.send_bytes(frame[4:])
        assert parse(os.read(reader.fileno(), 2 * CHUNK_BYTES)) == ([Chunk(9, 0, 1, b"x" * size)], len(frame))
