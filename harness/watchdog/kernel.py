"""The system calls that Python 3.10 does not offer: prctl(2), clone3(2) and close_range(2).

Called only from single-threaded processes (the watchdog, a keeper, a root before it executes its program), so the
thread that PR_SET_PDEATHSIG watches is the whole parent.
"""

from __future__ import annotations

import ctypes
import os
import signal as signals
import struct

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36

# One number on every architecture. glibc has a function for it from 2.34 on only.
_SYS_CLOSE_RANGE = 436
_SYS_PIDFD_GETFD = 438
_LAST_DESCRIPTOR = (1 << 32) - 1

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.argtypes = [ctypes.c_long, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint]
_prctl = _libc.prctl
_prctl.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]


# Not released while it is called: a child that has been cloned must find Python's lock in its own hands.
_locked_syscall = ctypes.PyDLL(None, use_errno=True).syscall
_CLONE3 = 435  # the same on every architecture that Python 3.10 runs on
_CLONE_INTO_CGROUP = 0x200000000
# struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, its size, tls, set_tid, its size, cgroup.
_CLONE_ARGS = struct.Struct("=11Q")


def fork_into(cgroup: str) -> int:
    """Fork a child that is born in a cgroup, given as a directory (Linux 5.7, clone3(2)); raises OSError.

    To move a process costs it 10 ms or more on a busy machine (the kernel waits until no process forks); to be born
    there costs nothing. The child is for executing a program at once: what Python does after a fork is not done in it.
    """
    descriptor = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        arguments = _CLONE_ARGS.pack(_CLONE_INTO_CGROUP, 0, 0, 0, signals.SIGCHLD, 0, 0, 0, 0, 0, descriptor)
        pid: int = _locked_syscall(_CLONE3, arguments, len(arguments))
        if pid < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"clone3: {os.strerror(number)}")
    finally:
        os.close(descriptor)
    return pid


def get_descriptor(pidfd: int, number: int) -> int:
    """Give a copy of another process's descriptor, offset and all (pidfd_getfd(2), Linux 5.6); raises OSError."""
    descriptor = int(_syscall(_SYS_PIDFD_GETFD, pidfd, number, 0))
    if descriptor < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return descriptor


def become_subreaper() -> None:
    """Make orphaned descendants re-parent to this process (Linux 3.4, prctl(2)). Not inherited by children."""
    _call(_PR_SET_CHILD_SUBREAPER, 1)


def signal_at_parent_death(signal: int) -> None:
    """Have the kernel send this process `signal` when its parent dies. Survives execve, not inherited by children."""
    _call(_PR_SET_PDEATHSIG, signal)


def set_name(name: str) -> None:
    """Set the name that `ps -o comm` shows: at most 15 bytes."""
    _call(_PR_SET_NAME, name.encode())


def close_all_but(kept: set[int]) -> None:
    """Close every file descriptor of this process that is not in `kept`.

    By close_range(2), Linux 5.9: a look into /proc/self/fd leaves the kernel an entry for each descriptor, which it has
    to tear down at this process's end. Hundreds of keepers that each inherit hundreds of descriptors would feel it.
    """
    first = 0
    for descriptor in [*sorted(kept), _LAST_DESCRIPTOR + 1]:
        if first < descriptor and not _close_range(first, descriptor - 1):
            _close_one_by_one(kept)
            return
        first = descriptor + 1


def _close_range(first: int, last: int) -> bool:
    return bool(_syscall(_SYS_CLOSE_RANGE, first, last, 0) == 0)


def _close_one_by_one(kept: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            try:
                os.close(int(name))
            except OSError:
                continue  # the one that listed the directory


def _call(option: int, argument: int | bytes) -> None:
    if _prctl(option, argument, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")
