"""Files that nobody else can have planted: a run's directory, `STATE/runs/RUN`, and what is in it. Used by both sides.

The state directory itself is checked by `state_dir.find`. Below it nothing is opened through a link, nor if it belongs
to another user, and nothing that is opened can block (a FIFO would).
"""

from __future__ import annotations

import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# An entry of the ledger is named by these and its server's key.
ENTRY_PREFIX = "server-"
ENTRY_SUFFIX = ".json"
# The file that says which test runs in the test process of a run, in at most so many bytes.
TEST_FILE = "test.txt"
LONGEST_TEST = 4096

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def open_run(run: str, *, make: bool = False) -> int:
    """Open the directory of a run, made with mode 0700 if `make` says so; raises OSError."""
    runs, name = os.path.split(run)
    state_dir, above = os.path.split(runs)
    descriptor = os.open(state_dir, _DIRECTORY)
    for part in (above, name):
        descriptor = _below(descriptor, part, make=make)
    return descriptor


def _below(parent: int, name: str, *, make: bool) -> int:
    try:
        if make:
            _make(name, parent)
        return _checked(os.open(name, _DIRECTORY, dir_fd=parent), name, stat.S_ISDIR)
    finally:
        os.close(parent)


def _make(name: str, parent: int) -> None:
    try:
        os.mkdir(name, 0o700, dir_fd=parent)
    except FileExistsError:
        return  # workers of one run begin at the same time


def open_file(path: str, flags: int) -> int:
    """Open a regular file of a run, whose directory is made if O_CREAT is among `flags`; raises OSError."""
    run, name = os.path.split(path)
    directory = open_run(run, make=bool(flags & os.O_CREAT))
    try:
        return _checked(os.open(name, flags | _FILE, 0o600, dir_fd=directory), name, stat.S_ISREG)
    finally:
        os.close(directory)


def _checked(descriptor: int, name: str, is_right: Callable[[int], bool]) -> int:
    found = os.fstat(descriptor)
    if found.st_uid == os.geteuid() and is_right(found.st_mode):
        return descriptor
    os.close(descriptor)
    raise PermissionError(1, f"{name} belongs to user {found.st_uid}, or is of another kind")
