"""The program that shows what servers write, as they write it: `python -I -S follower.py PID colour` (or `plain`).

It is a process of its own, since a test process that hangs in a C call could show nothing. Its standard input says what
to follow, a JSON object a line: `{"name": "rank0", "path": "/x/y.log", "start": 0}`, and `{"end": true}` at the end.
It ends there, at the end of its input, or with the process PID, its parent: a process that was forked from that may
hold the input open for as long as it likes. It imports nothing of the package, and waits for nobody but its output, for
which it waits no longer once its parent is dead.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import select
import signal
import stat
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# One rule says what may reach a terminal. Its module is executed by its path: a process without site packages does not
# find the package, and need not, for that module imports nothing of it.
_LOGS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "logs.py")
printable: Callable[[str], str] = runpy.run_path(_LOGS)["printable"]

_STDIN = 0
_STDOUT = 1
_POLL_S = 0.1
# So many seconds after its parent it ends, whatever its output takes.
_LAST_S = 5
_CHUNK_BYTES = 1 << 16
# Who is further behind than the first shows the end alone, of which the second is the length.
_MOST_BEHIND_BYTES = 1 << 20
_KEPT_BYTES = 1 << 16
_HELD_BYTES = 1 << 16
_LINE_CHARACTERS = 2000
_NAME_CHARACTERS = 100
# Those that can be read on light and on dark ground; red is left to what tests say themselves.
_COLOURS = (36, 33, 32, 35, 34, 96)
# No pipe, should one have taken the log's place, may stop this process, nor any terminal become its own.
_READING = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Log:
    """One server's log, by its path: a file that is held open would keep its disk space when it is removed."""

    def __init__(self, prefix: str, path: bytes, start: int) -> None:
        """Follow a file, which need not be there yet, from byte `start` on."""
        self._prefix = prefix
        self._path = path
        self._position = start
        self._identity: tuple[int, int] | None = None
        self._held = bytearray()
        self._is_cut = False

    def news(self) -> Iterator[str]:
        """Give what has been written since the last time, a batch of whole lines at a time."""
        found = self._stat()
        if found is None:
            return
        size, identity = found
        if size < self._position or self._identity not in {None, identity}:
            yield self.torn()
            self._position = 0
        self._identity = identity
        if size - self._position > _MOST_BEHIND_BYTES:
            yield self._skip(size)
        while self._position < size:
            data = self._read(self._position, min(_CHUNK_BYTES, size - self._position))
            if not data:
                return
            self._position += len(data)
            yield self._take(data)

    def torn(self) -> str:
        """Give the line that has not been completed, "" if there is none."""
        return self._line() if self._held else ""

    def _stat(self) -> tuple[int, tuple[int, int]] | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return (found.st_size, (found.st_dev, found.st_ino)) if stat.S_ISREG(found.st_mode) else None

    def _read(self, position: int, count: int) -> bytes:
        try:
            descriptor = os.open(self._path, _READING)
        except OSError:
            return b""
        try:
            return os.pread(descriptor, count, position)
        except OSError:
            return b""
        finally:
            os.close(descriptor)

    def _skip(self, size: int) -> str:
        self._is_cut = True
        torn = self.torn()
        self._is_cut = False
        window = self._read(size - _KEPT_BYTES, _KEPT_BYTES)
        begin = window.find(b"\n") + 1
        position = size - _KEPT_BYTES + (begin if begin < len(window) else 0)
        left_out, self._position = position - self._position, position
        return f"{torn}{self._prefix}... {left_out} bytes left out: {printable(os.fsdecode(self._path))}\n"

    def _take(self, data: bytes) -> str:
        *whole, rest = data.split(b"\n")
        lines = []
        for part in whole:
            self._hold(part)
            lines.append(self._line())
        self._hold(rest)
        return "".join(lines)

    def _hold(self, data: bytes) -> None:
        self._held += data
        if len(self._held) > _HELD_BYTES:
            # Of what is written over and over, as a progress bar is, the last is what `printable` shows.
            begin = self._held.rstrip(b"\r").rfind(b"\r") + 1
            if begin:
                del self._held[:begin]
                self._is_cut = False
        if len(self._held) > _HELD_BYTES:
            del self._held[_HELD_BYTES:]
            self._is_cut = True

    def _line(self) -> str:
        text = self._held.decode(errors="replace")
        if not text.isprintable():  # a look that spares most lines the rest
            text = printable(text)
        if self._is_cut or len(text) > _LINE_CHARACTERS:
            text = text[:_LINE_CHARACTERS] + " ..."
        self._held.clear()
        self._is_cut = False
        return f"{self._prefix}{text}\n"


class Program:
    """What is followed, for whom, and how it is shown."""

    def __init__(self, parent: int, *, with_colour: bool) -> None:
        """Serve the process `parent`."""
        self._parent = parent
        self._with_colour = with_colour
        self._logs: dict[bytes, Log] = {}
        self._unread = b""
        self._is_over = False
        self._seconds_alone = 0

    def outlive_nobody(self, _signal: int, _frame: object) -> None:
        """End, called each second, when the parent has been dead for a while: the output may take nothing any more."""
        self._seconds_alone += os.getppid() != self._parent
        if self._seconds_alone > _LAST_S:
            os._exit(0)

    def run(self) -> None:
        """Show until the end; raises OSError if nobody sees it any more."""
        while not self._is_over and os.getppid() == self._parent:
            self._listen(_POLL_S)
            self._look()
        while not self._is_over and self._listen(0.0):
            pass  # the last orders of a parent that was killed
        self._look()
        for log in self._logs.values():
            _write(log.torn())

    def _look(self) -> None:
        for log in self._logs.values():
            for text in log.news():
                _write(text)

    def _listen(self, timeout_s: float) -> bool:
        """Take what the input says; say whether it said anything."""
        if not select.select([_STDIN], [], [], timeout_s)[0]:
            return False
        data = os.read(_STDIN, _CHUNK_BYTES)
        *lines, self._unread = (self._unread + data).split(b"\n")
        if len(self._unread) > _CHUNK_BYTES:
            self._unread = b""  # no order is so long
        for line in lines:
            self._obey(line)
        self._is_over = self._is_over or not data
        return True

    def _obey(self, line: bytes) -> None:
        with contextlib.suppress(ValueError, RecursionError):
            order = json.loads(line)
            if not isinstance(order, dict):
                return
            if order.get("end") is True:
                self._is_over = True
                return
            name, path, start = (order.get(key) for key in ("name", "path", "start"))
            if isinstance(name, str) and isinstance(path, str) and type(start) is int and "\0" not in path:
                self._follow(name, os.fsencode(path), max(0, start))

    def _follow(self, name: str, path: bytes, start: int) -> None:
        prefix = f"[{printable(name)[:_NAME_CHARACTERS]}]"
        if self._with_colour:
            prefix = f"\x1b[{_COLOURS[len(self._logs) % len(_COLOURS)]}m{prefix}\x1b[0m"
        self._logs.setdefault(path, Log(f"{prefix} ", path, start))


def _write(text: str) -> None:
    # A terminal may not hold every character.
    rest = memoryview(text.encode(sys.stdout.encoding, "replace"))
    while rest:
        rest = rest[_write_some(rest) :]


def _write_some(data: memoryview) -> int:
    try:
        return os.write(_STDOUT, data)
    except BlockingIOError:
        # Whoever shares the terminal may have made it non-blocking, for all.
        room = select.poll()
        room.register(_STDOUT, select.POLLOUT)
        room.poll()
        return 0


def main() -> None:
    """Ignore Ctrl-C, which all in the foreground get (what servers say while they stop is wanted too), and show."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    program = Program(int(sys.argv[1]), with_colour=sys.argv[2] == "colour")
    signal.signal(signal.SIGALRM, program.outlive_nobody)
    signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
    with contextlib.suppress(OSError):  # nobody sees it any more
        program.run()
    signal.setitimer(signal.ITIMER_REAL, 0.0)  # an interpreter that ends has no handler, and the signal would kill it


if __name__ == "__main__":
    main()
