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


def new_path(directory: Path, name: str) -> Path:
    """Make a new server's log in `directory`, which is made; no two servers of any process, dead or alive, share one.

    Raises OSError for the directory only: what prevents the file is the keeper's to say, which opens it.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    readable = re.sub(r"[^\w.-]+", "_", name)[:80]
    while True:
        path = directory / f"{readable}-{os.getpid()}-{next(_numbers)}.log"
        # One may be there: of a process that had this pid, or has it in another container.
        try:
            os.close(os.open(path, _FRESH, 0o600))
        except FileExistsError:
            continue
        except OSError:
            pass
        return path


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
