"""The system calls that Python 3.10 does not offer: prctl(2).

Called only from single-threaded processes (the watchdog, a keeper, a root before it executes its program), so the
thread that PR_SET_PDEATHSIG watches is the whole parent.
"""

from __future__ import annotations

import ctypes
import os

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36

_prctl = ctypes.CDLL(None, use_errno=True).prctl
_prctl.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]


def become_subreaper() -> None:
    """Make orphaned descendants re-parent to this process (Linux 3.4, prctl(2)). Not inherited by children."""
    _call(_PR_SET_CHILD_SUBREAPER, 1)


def signal_at_parent_death(signal: int) -> None:
    """Have the kernel send this process `signal` when its parent dies. Survives execve, not inherited by children."""
    _call(_PR_SET_PDEATHSIG, signal)


def set_name(name: str) -> None:
    """Set the name that `ps -o comm` shows: at most 15 bytes."""
    _call(_PR_SET_NAME, name.encode())


def _call(option: int, argument: int | bytes) -> None:
    if _prctl(option, argument, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")
