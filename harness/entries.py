"""Reads the ledger's entries, which `watchdog/ledger.py` writes, and believes nothing that is not in the right form."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from harness import private
from harness.watchdog import ledger

if TYPE_CHECKING:
    from pathlib import Path

_LONGEST_BYTES = 1 << 20
# PID_MAX_LIMIT of the kernel (include/linux/threads.h).
_LARGEST_PID = 1 << 22


class Identity(NamedTuple):
    """One process for all time, within one boot and PID namespace."""

    pid: int
    start_time: int


@dataclass(frozen=True)
class Entry:
    """One server, as its watchdog and its keeper recorded it; `keeper`, `root` and `file` are None before it is up."""

    path: Path
    boot: str
    namespace: str
    client: Identity
    watchdog: Identity
    keeper: Identity | None
    root: Identity | None
    name: str
    mark: str
    log: str
    file: tuple[int, int] | None
    cgroup: str
    cgroup_inode: int
    members: frozenset[Identity] = field(repr=False)


class Unreadable(ValueError):  # noqa: N818 - it is what the file is
    """A file of the ledger that cannot be believed, with the reason."""


def read(path: Path) -> Entry | None:
    """Read an entry; None if there is none any more. Raises Unreadable."""
    try:
        lines = _read_lines(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        # O_NOFOLLOW says ELOOP for a link; a socket cannot be opened at all.
        reason = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise Unreadable(reason) from None
    facts: dict[str, object] = {}
    members: set[Identity] = set()
    for number, line in enumerate(lines):
        found = _parse(line, is_first=number == 0)
        members.update(_identities(found.pop("members", [])))
        facts.update(found)
    return _entry(path, facts, frozenset(members))


def _read_lines(path: Path) -> list[bytes]:
    descriptor = private.open_file(str(path), os.O_RDONLY)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if found.st_mode & 0o022:
            raise Unreadable("others may write to it")
        if found.st_size > _LONGEST_BYTES:
            raise Unreadable(f"it has {found.st_size} bytes")
        return [line for line in file.read(_LONGEST_BYTES).split(b"\n") if line]


def _parse(line: bytes, *, is_first: bool) -> dict[str, object]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        if is_first:
            raise Unreadable("it is not JSON") from None
        return {}  # torn by a crash or a full disk
    if not isinstance(found, dict):
        raise Unreadable("it holds no object")
    return found


def _entry(path: Path, facts: dict[str, object], members: frozenset[Identity]) -> Entry:
    if facts.get("version") != ledger.VERSION:
        raise Unreadable(f"its version is not {ledger.VERSION}")
    watchdog = _identity(facts.get("watchdog"))
    cgroup, inode = _cgroup(facts.get("cgroup"), path, watchdog)
    return Entry(
        path=path,
        boot=_text(facts, "boot"),
        namespace=_text(facts, "namespace"),
        client=_identity(facts.get("client")),
        watchdog=watchdog,
        keeper=_identity(facts["keeper"]) if "keeper" in facts else None,
        root=_identity(facts["root"]) if "root" in facts else None,
        name=_text(facts, "name"),
        mark=_mark(_text(facts, "mark"), path, watchdog),
        log=_text(facts, "log"),
        file=_pair(facts["file"]) if "file" in facts else None,
        cgroup=cgroup,
        cgroup_inode=inode,
        members=members,
    )


def _text(facts: dict[str, object], name: str) -> str:
    value = facts.get(name)
    if not isinstance(value, str) or "\0" in value:
        raise Unreadable(f"its {name} is no text")
    return value


def _pair(value: object) -> tuple[int, int]:
    match value:
        case [int(first), int(second)] if first >= 0 and second >= 0 and not isinstance(first, bool):
            return first, second
        case _:
            raise Unreadable("a pair of numbers in it is none")


def _identity(value: object) -> Identity:
    found = Identity(*_pair(value))
    if not 1 < found.pid <= _LARGEST_PID:
        raise Unreadable(f"process {found.pid} in it is none that could be recorded")
    return found


def _identities(value: object) -> set[Identity]:
    if not isinstance(value, list):
        raise Unreadable("its members are no list")
    return {_identity(each) for each in value}


def _mark(mark: str, path: Path, watchdog: Identity) -> str:
    run, _, rest = mark.partition("/")
    name, _, secret = rest.partition("/")
    expected = f"{watchdog.pid}-{watchdog.start_time}-{_key(path)}"
    is_its_own = name == expected and path.name == f"{private.ENTRY_PREFIX}{name}{private.ENTRY_SUFFIX}"
    if run != path.parent.name or not is_its_own or len(secret) != 16:  # noqa: PLR2004 - as ledger makes it
        raise Unreadable("its mark is that of another entry")
    return mark


def _cgroup(value: object, path: Path, watchdog: Identity) -> tuple[str, int]:
    match value:
        case ["", 0]:
            return "", 0
        case [str(directory), int(inode)]:
            expected = f"/harness-{watchdog.pid}-{watchdog.start_time}/{_key(path)}"
            is_ours = directory.startswith("/") and directory.endswith(expected) and ".." not in directory.split("/")
            if is_ours and "\0" not in directory:
                return directory, inode
    raise Unreadable("its cgroup is not one that its watchdog can have made")


def _key(path: Path) -> str:
    return path.name.removesuffix(private.ENTRY_SUFFIX).rpartition("-")[2]
