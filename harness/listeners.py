"""Who listens on a port: an answer on a server's port proves nothing if another process gave it."""

from __future__ import annotations

import os
from pathlib import Path

_LISTENING = "0A"  # TCP_LISTEN, include/net/tcp_states.h


def inodes(port: int) -> set[str]:
    """Give the inodes of all sockets that listen on a TCP port of this network namespace (proc(5), /proc/net/tcp)."""
    wanted = f":{port:04X}"
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in _lines(table):
            fields = line.split()
            if fields[3] == _LISTENING and fields[1].endswith(wanted):
                found.add(fields[9])
    return found


def _lines(table: str) -> list[str]:
    try:
        return Path(table).read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return []


def are_all_of(pids: list[int], port: int) -> bool:
    """Say whether some process listens on the port, and each that does is one of `pids`.

    A process whose descriptors may not be read (it changed its user) gets the benefit of the doubt.
    """
    wanted = inodes(port)
    if not wanted:
        return False
    for pid in pids:
        try:
            wanted -= _inodes_of(pid)
        except PermissionError:
            return True
        if not wanted:
            return True
    return False


def _inodes_of(pid: int) -> set[str]:
    directory = f"/proc/{pid}/fd"
    found: set[str] = set()
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return found
    for name in names:
        try:
            target = os.readlink(f"{directory}/{name}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found
