"""How many file descriptors the watchdog may hold: three and more for each server.

The soft limit is often 1024, for the sake of programs that use select(2). The watchdog raises its own up to the hard
limit; keepers, and so servers, get back what the test process had.
"""

from __future__ import annotations

import errno
import os
import resource

_KIND = resource.RLIMIT_NOFILE
# These stay free: without a descriptor /proc cannot be read, and what a lost keeper leaves would not be found.
_RESERVE = 32

_given: tuple[int, int] | None = None


def raise_descriptors() -> None:
    """Raise this process's soft limit to its hard limit."""
    global _given  # noqa: PLW0603 - a limit is the process's own, and forked keepers must know what it was
    _given = resource.getrlimit(_KIND)
    _set((_given[1], _given[1]))


def restore_descriptors() -> None:
    """Set the limit back to what the test process had; what is open stays open."""
    if _given is not None:
        _set(_given)


def _set(limits: tuple[int, int]) -> None:
    try:
        resource.setrlimit(_KIND, limits)
    except (OSError, ValueError):
        return  # the hard limit is above what the kernel allows now (fs.nr_open)


def check_descriptor(descriptor: int) -> None:
    """Raise OSError (EMFILE) where this descriptor is one of the last. The kernel gives the lowest that is free."""
    if descriptor >= resource.getrlimit(_KIND)[0] - _RESERVE:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def describe(error: OSError) -> str:
    """Say what went wrong, and which limit it was."""
    if error.errno != errno.EMFILE:
        return str(error.strerror)
    limit = resource.getrlimit(_KIND)[0]
    return f"{error.strerror}: the watchdog may hold {limit}, the hard limit of RLIMIT_NOFILE (`ulimit -Hn`)"
