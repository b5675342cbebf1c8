"""The readiness checks: `http_ok`, `port_open`, `log_line`, or any callable that takes the server and gives a bool.

A check is asked again and again by one thread that waits for many servers, so a check of ours never blocks: it is a
`Probe` that does one step at a time and says which descriptor it waits for.
"""

from __future__ import annotations

import os
import re
import select
import socket
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

from harness import listeners, specs
from harness.errors import SpecError

if TYPE_CHECKING:
    from harness.server import Server

# On loopback a connection is taken or refused at once; it takes long only when the server's backlog is full.
_CONNECT_S = 0.05
# A server that takes the request but loads for minutes answers it then; one that has lost it is asked again, more and
# more rarely, since requests that are given up may queue up in the server.
_PATIENCE_S = 2.0
_LONGEST_PATIENCE_S = 60.0
# How long an answer's end is waited for once its status is there.
_ANSWER_END_S = 0.02
_ONCE_S = 1.0
_READ_BYTES = 1 << 20
_LINE_BYTES = 1 << 16


class Probe(Protocol):
    """One server's check under way."""

    seen: str
    """What was seen last, for the error."""

    @property
    def waits_for(self) -> int | None:
        """Give the descriptor whose readability is worth another step; None: only time is."""

    def step(self) -> bool:
        """Go one step further without blocking, and say whether the server is ready."""

    def close(self) -> None:
        """Let go of what the probe holds."""


class Check(ABC):
    """A readiness check of ours, as a user may also call it: once."""

    def __call__(self, server: Server) -> bool:
        """Look once, waiting at most 1 s for an answer."""
        return _once(self.begin(server))

    @abstractmethod
    def begin(self, server: Server) -> Probe:
        """Begin to probe a server."""


class HttpOk(Check):
    """Ready when GET on the path answers with the status, from the server's own tree."""

    def __init__(self, path: str, status: int, port: int | None) -> None:
        """Take what `http_ok` checked."""
        self.path = path
        self.status = status
        self.port = port

    def __repr__(self) -> str:
        """Say what is waited for."""
        return f"HTTP {self.status} from {self.path}"

    def begin(self, server: Server) -> Probe:
        """Begin to probe a server."""
        return HttpProbe(server, self)


class PortOpen(Check):
    """Ready when the server's own tree listens on the port."""

    def __init__(self, port: int | None) -> None:
        """Take what `port_open` checked."""
        self.port = port

    def __repr__(self) -> str:
        """Say what is waited for."""
        return f"port {self.port or 'of the server'} to be open"

    def begin(self, server: Server) -> Probe:
        """Begin to probe a server."""
        return _PortProbe(server, self.port if self.port is not None else server.port)


class LogLine(Check):
    """Ready when a line of the server's log matches the pattern."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        """Take what `log_line` checked."""
        self.pattern = pattern

    def __repr__(self) -> str:
        """Say what is waited for."""
        return f"a log line that matches {self.pattern.pattern!r}"

    def begin(self, server: Server) -> Probe:
        """Begin to probe a server."""
        return _LogProbe(server, self.pattern)


def http_ok(path: str = "/health", *, status: int = 200, port: int | None = None) -> HttpOk:
    """Wait for an HTTP status from a path of the server's main port, or of `port`. Raises SpecError."""
    text = specs.text(path, "the path")
    if not re.fullmatch(r"/[!-~]*", text):
        raise SpecError(f"the path must begin with '/' and hold no spaces: {text!r}")
    if isinstance(status, bool) or not isinstance(status, int) or not 100 <= status <= 599:  # noqa: PLR2004 - RFC 9110, 15
        raise SpecError(f"an HTTP status is a number from 100 to 599, not {status!r}")
    return HttpOk(text, status, _port(port))


def port_open(*, port: int | None = None) -> PortOpen:
    """Wait until the server listens on its main port, or on `port`. Raises SpecError."""
    return PortOpen(_port(port))


def log_line(pattern: str | re.Pattern[str]) -> LogLine:
    """Wait for a line of the server's log in which the regular expression is found. Raises SpecError."""
    if isinstance(pattern, re.Pattern):
        if not isinstance(pattern.pattern, str):
            raise SpecError("the pattern must be of text, not of bytes")
        return LogLine(pattern)
    try:
        return LogLine(re.compile(specs.text(pattern, "the pattern")))
    except re.error as error:
        raise SpecError(f"{pattern!r} is not a regular expression: {error}") from None


def _port(port: int | None) -> int | None:
    if port is not None and (isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 1 << 16):
        raise SpecError(f"a port is a number from 1 to 65535, not {port!r}")
    return port


def _once(probe: Probe) -> bool:
    try:
        is_ready = probe.step()
        deadline = time.monotonic() + _ONCE_S
        while not is_ready and probe.waits_for is not None and (left := deadline - time.monotonic()) > 0:
            poll = select.poll()
            poll.register(probe.waits_for, select.POLLIN)
            poll.poll(left * 1000)
            is_ready = probe.step()
        return is_ready
    finally:
        probe.close()


def _connect(host: str, port: int) -> socket.socket | None:
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    connection.settimeout(_CONNECT_S)
    result = connection.connect_ex((host, port))
    # On a port of the ephemeral range a connection can meet itself, when nobody listens (TCP simultaneous open).
    if result != 0 or connection.getsockname() == connection.getpeername():
        connection.close()
        return None
    return connection


class _PortProbe:
    def __init__(self, server: Server, port: int) -> None:
        self._server = server
        self._port = port
        self.waits_for: int | None = None
        self.seen = "nothing listens on the port"

    def step(self) -> bool:
        connection = _connect(self._server.host, self._port)
        if connection is None:
            return False
        connection.close()
        is_own = listeners.are_all_of(self._server.pids(), self._port)
        self.seen = f"a process that is not this server's listens on port {self._port}"
        return is_own

    def close(self) -> None:
        """Nothing is held."""


class HttpProbe:
    """One server's check by HTTP under way. Where the server is, and whose answer counts, can be overridden."""

    headers: tuple[str, ...] = ()
    """Lines beside those that every request has."""

    def __init__(self, server: Server, check: HttpOk) -> None:
        """Take the server and what makes it ready."""
        self._server = server
        self._check = check
        self._connection: socket.socket | None = None
        self._answer = b""
        self._asked = 0.0
        self._patience_s = _PATIENCE_S
        self._has_been_answered = False
        self.seen = "nothing listens on the port"

    @property
    def _port(self) -> int:
        return self._check.port if self._check.port is not None else self._server.port

    def connect(self) -> socket.socket | None:
        """Connect to the server, in at most some 50 ms; None if nobody takes the connection."""
        return _connect(self._server.host, self._port)

    @property
    def authority(self) -> str:
        """Give what the request calls the server."""
        return f"{self._server.host}:{self._port}"

    def is_own(self) -> bool:
        """Say whether it is this server that answers."""
        if listeners.are_all_of(self._server.pids(), self._port):
            return True
        self.seen = f"a process that is not this server's answers on port {self._port}"
        return False

    @property
    def waits_for(self) -> int | None:
        """Give the connection on which an answer is awaited."""
        return None if self._connection is None else self._connection.fileno()

    def step(self) -> bool:
        """Ask, or look for the answer."""
        if self._connection is None:
            self._ask()
            return False
        if not self._has_answered(self._connection):
            return False
        try:
            return self._read_status() == self._check.status and self.is_own()
        finally:
            self.close()

    def _ask(self) -> None:
        connection = self.connect()
        if connection is None:
            return
        if not self._has_been_answered:
            self.seen = "the port is open, but the request is not answered"
        lines = (
            f"GET {self._check.path} HTTP/1.1",
            f"Host: {self.authority}",
            "User-Agent: pytest-watchdog-harness",
            "Accept: */*",
            "Connection: close",
            *self.headers,
        )
        try:
            connection.sendall("\r\n".join((*lines, "", "")).encode())
        except OSError as error:
            self.seen = f"the connection broke off: {error}"
            connection.close()
        else:
            connection.setblocking(False)
            self._connection, self._answer, self._asked = connection, b"", time.monotonic()

    def _has_answered(self, connection: socket.socket) -> bool:
        # Wait for the end of the answer, if it comes soon: a server whose answer is cut off may say so in its log.
        try:
            while part := connection.recv(_READ_BYTES):
                self._answer = (self._answer + part)[:_LINE_BYTES]
                if len(self._answer) == _LINE_BYTES:
                    return True
        except BlockingIOError:
            waited_s = time.monotonic() - self._asked
            has_head = b"\r\n\r\n" in self._answer
            if waited_s > self._patience_s:
                self._patience_s = min(self._patience_s * 2, _LONGEST_PATIENCE_S)
                return True
            return has_head and waited_s > _ANSWER_END_S
        except OSError as error:
            self.seen = f"its answer broke off: {error}"
        else:
            self.seen = "its answer broke off: it hung up"
        return True

    def _read_status(self) -> int | None:
        self._has_been_answered = True
        found = re.match(rb"HTTP/1\.[01] ([0-9]{3})[ \r\n]", self._answer)
        if found is None:
            if self._answer:
                self.seen = f"its answer is not HTTP: {self._answer[:60]!r}"
            return None
        self.seen = f"it answered {found.group(1).decode()}"
        return int(found.group(1))

    def close(self) -> None:
        """Let go of the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class _LogProbe:
    def __init__(self, server: Server, pattern: re.Pattern[str]) -> None:
        self._path = server.log_path
        self._pattern = pattern
        self._at = 0
        self._line = b""
        self.waits_for: int | None = None
        self.seen = "its log is empty"

    def step(self) -> bool:
        with self._path.open("rb") as log:
            size = os.fstat(log.fileno()).st_size
            while self._at < size:
                log.seek(self._at)
                data = log.read(_READ_BYTES)
                self._at += len(data)
                if not data or self._is_in(data):
                    return bool(data)
        return False

    def _is_in(self, data: bytes) -> bool:
        self.seen = "no line of its log matches"
        *lines, self._line = (self._line + data).split(b"\n")
        self._line = self._line[-_LINE_BYTES:]
        return any(self._pattern.search(line.decode(errors="replace")) for line in (*lines, self._line))

    def close(self) -> None:
        """Nothing is held."""
