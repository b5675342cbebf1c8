"""The cgroup of each server, where this process may make one: cgroups(7), version 2, with cgroup.kill (Linux 5.14).

A cgroup is killed at once, whatever is being forked in it. It is an addition: a process that may write to cgroups can
move out of its own, so the sweep goes on until waitpid(2) says ECHILD, with a cgroup or without.
"""

from __future__ import annotations

import os
import time

from harness.records import Record

# A process that has been reaped may count in its cgroup for a moment longer.
_REMOVE_TRIES = 20
_REMOVE_PAUSE_S = 0.0005
_ESCAPES = ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\"))


class Place(Record):
    """A directory of cgroups, or "" and the reason why there is none."""

    directory: str
    reason: str


def own() -> Place:
    """Give the directory of this process's own cgroup, under which alone it may hope to make others."""
    try:
        path = _own_path(_lines("/proc/self/cgroup"))
        mounts = [line for line in _lines("/proc/self/mountinfo") if line.partition(" - ")[2].startswith("cgroup2 ")]
    except OSError as error:
        return Place("", f"/proc/self cannot be read: {error.strerror}")
    if path is None or not mounts:
        return Place("", "no cgroup v2 is mounted here")
    root, mount_point = (_unescaped(field) for field in mounts[0].split(" ")[3:5])
    below = path if root == "/" else path[len(root) :] if f"{path}/".startswith(f"{root}/") else None
    if below is None or ".." in path.split("/"):
        return Place("", f"this process's cgroup, {path}, is outside of what is mounted at {mount_point}")
    return Place(f"{mount_point}{below}".rstrip("/"), "")


def _own_path(lines: list[str]) -> str | None:
    return next((line[3:] for line in lines if line.startswith("0::")), None)


def _lines(path: str) -> list[str]:
    with open(path, "rb") as file:
        return os.fsdecode(file.read()).split("\n")


def _unescaped(field: str) -> str:
    for escape, character in _ESCAPES:
        field = field.replace(escape, character)
    return field


def make(name: str) -> Place:
    """Make a cgroup below this process's own, in which servers can have theirs; say why if that cannot be done."""
    above = own()
    if not above.directory:
        return above
    place = Place(f"{above.directory}/{name}", "")
    try:
        # To put a process there takes the right to write to the common ancestor as well.
        os.close(os.open(f"{above.directory}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))
        os.mkdir(place.directory)
    except OSError as error:
        return Place("", f"this process's own cgroup, {above.directory}, does not allow it: {error.strerror}")
    reason = _what_is_missing(place.directory)
    if reason:
        remove(place.directory)
    return Place("", reason) if reason else place


def _what_is_missing(directory: str) -> str:
    if not os.path.exists(f"{directory}/cgroup.kill"):
        return "cgroup.kill is missing: that needs Linux 5.14"
    kind = _lines(f"{directory}/cgroup.type")[0]
    return "" if kind == "domain" else f"a new cgroup here takes no process: its type is {kind!r}"


def kill(directory: str) -> bool:
    """Send SIGKILL to everything in a cgroup and below it, at once; False if that cannot be done."""
    try:
        _write(f"{directory}/cgroup.kill", b"1")
    except OSError:
        return False
    return True


def _write(path: str, text: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text)
    finally:
        os.close(descriptor)


def below(directory: str) -> list[str]:
    """Give a cgroup and all that are below it (a server may make its own), each before those below it."""
    found = [directory]
    for parent in found:
        try:
            found += [entry.path for entry in os.scandir(parent) if entry.is_dir(follow_symlinks=False)]
        except OSError:  # noqa: PERF203 - each may be
            continue  # removed meanwhile, or deeper than a path can be long
    return found


def members(directory: str) -> list[int]:
    """Give the processes in a cgroup and below it."""
    pids: list[int] = []
    for each in below(directory):
        try:
            pids += [int(line) for line in _lines(f"{each}/cgroup.procs") if line]
        except OSError:  # noqa: PERF203 - each may be
            continue  # removed meanwhile, or a threaded one, whose processes are listed above it
    return pids


def remove(directory: str) -> bool:
    """Remove a cgroup with all below it; False if there is still a process in it."""
    for _ in range(_REMOVE_TRIES):
        if _rmdir(directory):
            return True
        left = [each for each in reversed(below(directory)) if not _rmdir(each)]
        if not left:
            return True
        if members(directory):
            return False
        time.sleep(_REMOVE_PAUSE_S)
    return False


def remove_empty(directory: str) -> None:
    """Remove a cgroup if there is nothing in it, neither a process nor a cgroup."""
    _rmdir(directory)


def _rmdir(directory: str) -> bool:
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
