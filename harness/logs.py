"""Log files of servers: their names, and their last lines."""

from __future__ import annotations

import itertools
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_numbers = itertools.count(1)
# A line of a progress bar or of binary output can be of any length; the tail is for people.
_TAIL_BYTES = 1 << 16
_LINE_CHARACTERS = 2000
_FRESH = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])")
_LONGEST_PART = 100


def new_path(directory: Path, name: str, test: str = "") -> Path:
    """Make a new server's log in `directory`, which is made; no two servers of any process, dead or alive, share one.

    It says which test or fixture launched the server, if one did, and the server's name. Raises OSError for the
    directory only: what prevents the file is the keeper's to say, which opens it.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    file, separator, rest = test.partition("::")
    words = [_readable(word) for word in (f"{file.rpartition('/')[2]}{separator}{rest}", name) if word]
    while True:
        path = directory / f"{'--'.join(words)}-{os.getpid()}-{next(_numbers)}.log"
        # One may be there: of a process that had this pid, or has it in another container.
        try:
            os.close(os.open(path, _FRESH, 0o600))
        except FileExistsError:
            continue
        except OSError:
            pass
        return path


def _readable(text: str) -> str:
    # The end says most of a long test id; a file's name may have 255 bytes (NAME_MAX).
    return re.sub(r"[^\w.-]+", "_", text).strip("_").encode()[-_LONGEST_PART:].decode(errors="ignore")


def tail(path: Path, lines: int) -> str:
    """Give the last lines of a log; only its end is read, however long it is."""
    try:
        with path.open("rb") as log:
            size = os.fstat(log.fileno()).st_size
            log.seek(max(0, size - _TAIL_BYTES))
            text = log.read(_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ""
    whole = text.splitlines()
    if size > _TAIL_BYTES and len(whole) > 1:
        del whole[0]
    return "\n".join(line[-_LINE_CHARACTERS:] for line in whole[-lines:]) if lines > 0 else ""


def tail_since(path: Path, lines: int, since: int) -> list[tuple[bool, str]]:
    """Give the last lines of a log for people, each with whether it was written after the first `since` bytes.

    What steers a terminal is left out. A line that was begun before and ended after that counts as written after it.
    """
    try:
        with path.open("rb") as log:
            start = max(0, os.fstat(log.fileno()).st_size - _TAIL_BYTES)
            log.seek(start)
            data = log.read(_TAIL_BYTES)
    except OSError:
        return []
    found: list[tuple[bool, str]] = []
    for line in data.splitlines(keepends=True):
        start += len(line)
        found.append((start > since, printable(line.decode(errors="replace"))[-_LINE_CHARACTERS:]))
    if len(data) == _TAIL_BYTES and len(found) > 1:
        del found[0]  # it may have begun before what was read
    return found[-lines:]


def printable(text: str) -> str:
    """Leave out colours and other escape sequences (ECMA-48), and show what else is no text as "?"."""
    plain = _ESCAPES.sub("", text).rstrip("\r\n").expandtabs()
    return "".join(character if character.isprintable() else "?" for character in plain.rpartition("\r")[2])


def size(path: Path) -> int:
    """Give how long a log is, in bytes; 0 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
