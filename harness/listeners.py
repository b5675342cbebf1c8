"""Who listens on a port: an answer on a server's port proves nothing if another process gave it."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from pathlib import Path

from harness import procfs

# sock_diag(7): a dump of the sockets in one state. /proc/net/tcp tells the same, but walks the whole connection hash of
# the host for it, which takes some ms.
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST_DUMP = 0x301
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_TCP_LISTEN = 10  # include/net/tcp_states.h
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port id
_REQUEST = struct.Struct("=BBBxI48x")  # struct inet_diag_req_v2: family, protocol, extensions, states, socket id
# struct inet_diag_msg, up to the inode: the source port and address are in network order.
_ANSWER = struct.Struct("!4xH2x16s44xI")
_ANY = bytes(16)
_MAPPED = bytes(10) + b"\xff\xff"  # before an IPv4 address in an IPv6 one (RFC 4291, 2.5.5.2)


def inodes(port: int, host: str = "") -> set[str]:
    """Give the inodes of all sockets that listen on a TCP port of this network namespace.

    Where `host` is an address, only of those that get what is sent to it; where the kernel tells.
    """
    try:
        found = [answer for family in (socket.AF_INET, socket.AF_INET6) for answer in _dump(family, port)]
    except OSError:
        return _inodes_by_proc(port)
    wanted = _addresses(host)
    return {str(inode) for address, inode in found if not wanted or address in wanted}


def _addresses(host: str) -> set[bytes]:
    """Give what a socket that gets what is sent to an address may be bound to, in 16 bytes; none for a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            packed = socket.inet_pton(family, host)
            # An IPv4 socket has its address in the first 4 of the 16.
            return {_ANY, packed.ljust(16, b"\0"), (_MAPPED + packed)[-16:]}
    return set()


def _dump(family: int, port: int) -> list[tuple[bytes, int]]:
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 1 << _TCP_LISTEN)
    header = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0)
    found: list[tuple[bytes, int]] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as diag:
        diag.settimeout(1.0)
        diag.send(header + body)
        while _read_part(diag.recv(1 << 16), port, found):
            pass
    return found


def _read_part(data: bytes, port: int, found: list[tuple[bytes, int]]) -> bool:
    at = 0
    while at < len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        if kind == _NLMSG_DONE:
            return False
        if kind == _NLMSG_ERROR:
            raise OSError("the kernel does not answer sock_diag(7)")
        source_port, address, inode = _read_socket(data, at + _HEADER.size)
        if source_port == port:
            found.append((address, inode))
        at += (length + 3) & ~3
    return True


def _read_socket(data: bytes, at: int) -> tuple[int, bytes, int]:
    source_port, address, _ = _ANSWER.unpack_from(data, at)
    (inode,) = struct.unpack_from("=I", data, at + _ANSWER.size - 4)
    return source_port, address, inode


def _inodes_by_proc(port: int) -> set[str]:
    wanted = f":{port:04X}"
    state = f"{_TCP_LISTEN:02X}"
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in _lines(table):
            fields = line.split()
            if fields[3] == state and fields[1].endswith(wanted):
                found.add(fields[9])
    return found


def _lines(table: str) -> list[str]:
    try:
        return Path(table).read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return []


def are_all_of(pids: list[int], port: int, host: str = "") -> bool:
    """Say whether some process listens on the port (of this address), and each that does is one of `pids`.

    A process whose descriptors may not be read (it changed its user) gets the benefit of the doubt.
    """
    wanted = inodes(port, host)
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


def holders(port: int) -> list[int]:
    """Give the processes that are known to listen on a port: of those of other users it is not."""
    wanted = inodes(port)
    found = []
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()] if wanted else []
    for pid in pids:
        with contextlib.suppress(OSError):
            if wanted & _inodes_of(pid):
                found.append(pid)
    return found


def describe(port: int) -> str:
    """Say who is known to listen on a port, to be added to a text; "" if nobody is."""
    found = [f"pid {pid} ({procfs.name(pid)})" for pid in holders(port)]
    return f"; {', '.join(found)} listens on port {port}" if found else ""


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
