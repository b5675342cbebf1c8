"""The client's end of the Pipe: one request, one reply, each by a deadline, from any number of threads.

An exception may strike between any two instructions of the main thread (Ctrl-C, pytest-timeout's SIGALRM). So a frame
is sent by one system call, whole or not at all, and a reply is looked at first and taken out of the socket only when it
has been filed: doing that twice does no harm, being interrupted half-way loses nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import threading
import time
from typing import TYPE_CHECKING

from harness import asynchronous, frames

if TYPE_CHECKING:
    from collections.abc import Callable

_PEEK_BYTES = 1 << 18
_SLICE_S = 1.0
# poll(2) counts milliseconds in 31 bits, and Python raises OverflowError for more.
_LONGEST_POLL_S = 86400.0
# The message id of what a watchdog says that cannot start.
_LAST_WORDS = 0


class ChannelClosed(Exception):  # noqa: N818 - it is a fact, which the caller turns into an error with a reason
    """The other end is closed."""


class NoReply(Exception):  # noqa: N818 - as above
    """The other end did not take the request, or did not reply, by the deadline."""


class Channel:
    """Sends requests and gives each thread the reply to its own."""

    def __init__(self, descriptor: int) -> None:
        """Take over the file descriptor of the client's end."""
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(False)
        # Half of this must hold a frame, or the kernel would take a part of one (frames.py).
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * frames.CHUNK_BYTES)
        self._ids = itertools.count(1)
        self._state = threading.Condition()
        self._reader: int | None = None
        self._assembler = frames.Assembler()
        self._awaited = {_LAST_WORDS}
        self._is_filing = False
        self._replies: dict[int, bytes] = {}

    def close(self) -> None:
        """Close this end; the watchdog takes that as the end of the test process."""
        self._socket.close()

    def new_id(self) -> int:
        """Give the id of a message that is to be sent."""
        return next(self._ids)

    def request(
        self, message_id: int, message: bytes, timeout_s: float, meanwhile: Callable[[], None] | None = None
    ) -> bytes:
        """Send a request and wait for its reply; raises ChannelClosed, NoReply, or FrameError if it is too large.

        `meanwhile` is called about once in a second while it waits.
        """
        __tracebackhide__ = True  # the message holds the environment, which a traceback must not show
        deadline = time.monotonic() + timeout_s
        parts = frames.split(message_id, message)
        try:
            self._awaited.add(message_id)
            for frame in parts:
                self._send(frame, deadline)
            return self._reply(message_id, deadline, meanwhile)
        except (OSError, ValueError):
            raise ChannelClosed from None  # ValueError: closed by another thread, or by a signal handler
        finally:
            self._awaited.discard(message_id)
            self._replies.pop(message_id, None)

    def last_words(self) -> bytes | None:
        """Give what the other end said before it died, if it could."""
        with contextlib.suppress(OSError, ChannelClosed), self._state:
            self._file_replies()
        return self._replies.get(_LAST_WORDS)

    def _send(self, frame: bytes, deadline: float) -> None:
        while frame:
            try:
                frame = frame[self._socket.send(frame) :]
            except BlockingIOError:  # noqa: PERF203 - the loop runs once, but for a watchdog that is slow to read
                if not self._await(select.POLLOUT, deadline):
                    raise NoReply from None

    def _reply(self, message_id: int, deadline: float, meanwhile: Callable[[], None] | None) -> bytes:
        __tracebackhide__ = True
        me = threading.get_ident()
        while True:
            with self._state:
                if message_id in self._replies:
                    return self._replies[message_id]
                # A reader that is this thread was interrupted before it could say that it reads no more.
                is_reader = self._reader in {None, me}
                if is_reader:
                    self._reader = me
                else:
                    self._state.wait(min(asynchronous.slice_s(_SLICE_S), max(0.0, deadline - time.monotonic())))
            if is_reader:
                # In slices: a request from a signal handler may have filed this one's reply in the meantime.
                self._read_for_all(min(deadline, time.monotonic() + asynchronous.slice_s(_SLICE_S)))
            if message_id not in self._replies:
                asynchronous.check()
                if time.monotonic() >= deadline:
                    raise NoReply
                if meanwhile is not None:
                    meanwhile()

    def _read_for_all(self, deadline: float) -> None:
        __tracebackhide__ = True
        try:
            if self._await(select.POLLIN, deadline):
                with self._state:
                    self._file_replies()
        finally:
            with self._state:
                self._reader = None
                self._state.notify_all()

    def _file_replies(self) -> None:
        # A signal handler may come here while the thread that it interrupts is here. It files what is there, and leaves
        # it in the socket: the interrupted one would take as much as it has seen.
        is_nested, self._is_filing = self._is_filing, True
        try:
            used = self._file()
            if used and not is_nested:
                self._socket.recv(used)
        finally:
            self._is_filing = is_nested

    def _file(self) -> int:
        """File the replies that can be seen in the socket, and give how many bytes they are."""
        try:
            seen = self._socket.recv(_PEEK_BYTES, socket.MSG_PEEK)
        except BlockingIOError:
            return 0
        except ConnectionResetError:
            # It ended with a request unread: the kernel says so once, before it gives the last replies.
            return 0
        if not seen:
            raise ChannelClosed
        chunks, used = frames.parse(seen)
        for chunk in chunks:
            reply = self._assembler.add(chunk)
            if reply is not None and chunk.message_id in self._awaited:
                self._replies[chunk.message_id] = reply
        return used

    def _await(self, event: int, deadline: float) -> bool:
        __tracebackhide__ = True
        poll = select.poll()
        poll.register(self._socket, event)
        return bool(poll.poll(min(max(0.0, deadline - time.monotonic()), _LONGEST_POLL_S) * 1000))
