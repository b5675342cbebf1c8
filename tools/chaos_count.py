"""Counts what is left of a trial, without asking the product: by a cgroup, or by the trial's own marks in /proc."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_MARKS_POLL_S = 0.02
_REMOVE_LIMIT_S = 5.0
_ENTER = 'for procs in $1; do echo 0 > "$procs" || exit 99; done; shift; exec "$@"'


class Place(Protocol):
    """Where one trial's processes are."""

    method: str

    def command(self, program: Sequence[str]) -> list[str]:
        """Give the command that runs a program there."""

    def pids(self) -> list[int]:
        """Give the pid of everything that lives there; what has ended and was not reaped does not live."""

    @property
    def descriptor(self) -> int | None:
        """Give what poll(2) says POLLPRI of when the last process has left, None if there is no such thing."""

    def deny_processes(self, room: int) -> str:
        """Let no more than `room` further processes be made there, and say how that was done; "" if it cannot be."""

    def kill(self) -> None:
        """End what is left."""

    def remove(self) -> None:
        """Take the place away, once it is empty."""


class CgroupPlace:
    """A cgroup of version 2; what is in the cgroups below it counts as well."""

    method = "cgroup"

    def __init__(self, path: Path, pids_path: Path | None) -> None:
        """Make it, and one of the pids controller of version 1 where that is given."""
        self._path = path
        self._pids_path = pids_path
        path.mkdir()
        if pids_path is not None:
            pids_path.mkdir()
        self.descriptor: int | None = os.open(path / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)

    def command(self, program: Sequence[str]) -> list[str]:
        """Give a command that moves itself before it executes the program."""
        paths = [self._path] if self._pids_path is None else [self._path, self._pids_path]
        return ["/bin/sh", "-c", _ENTER, "enter", " ".join(f"{path}/cgroup.procs" for path in paths), *program]

    def pids(self) -> list[int]:
        """Read cgroup.procs here and below; a zombie is not in it (cgroup-v2.rst)."""
        found: list[int] = []
        for folder, _, _ in os.walk(self._path):
            with contextlib.suppress(OSError):
                found += map(int, Path(folder, "cgroup.procs").read_text(encoding="ascii").split())
        return found

    def deny_processes(self, room: int) -> str:
        """Lower pids.max, which binds root as well: fork fails with EAGAIN, as it does with RLIMIT_NPROC."""
        path = self._pids_path or self._path
        try:
            now = int((path / "pids.current").read_text(encoding="ascii"))
            (path / "pids.max").write_text(str(now + room), encoding="ascii")
        except OSError:
            return ""
        return "pids.max"

    def kill(self) -> None:
        """Write cgroup.kill (Linux 5.14), which works on what is below too."""
        (self._path / "cgroup.kill").write_text("1", encoding="ascii")

    def remove(self) -> None:
        """Remove it and what the product made below it."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
        folders = [Path(folder) for folder, _, _ in os.walk(self._path, topdown=False)]
        for folder in [*folders, *([self._pids_path] if self._pids_path else [])]:
            _remove_cgroup(folder)


def _remove_cgroup(folder: Path) -> None:
    # One that is empty is busy until what was in it has been reaped.
    deadline = time.monotonic() + _REMOVE_LIMIT_S
    while not _is_removed(folder, is_last=time.monotonic() > deadline):
        time.sleep(_MARKS_POLL_S)


def _is_removed(folder: Path, *, is_last: bool) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        if is_last:
            raise
        return False
    return True


class MarksPlace:
    """The processes that carry a trial's directory: in arguments, environment, working directory or open files."""

    method = "marks in /proc"
    descriptor = None

    def __init__(self, directory: Path, is_exempt: Callable[[int], bool]) -> None:
        """Take the directory, and who carries it without being of the trial."""
        self._mark = str(directory)
        self._is_exempt = is_exempt

    def command(self, program: Sequence[str]) -> list[str]:
        """Give the program itself: its marks do."""
        return list(program)

    def pids(self) -> list[int]:
        """Look at every process there is."""
        everybody = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [pid for pid in everybody if self._is_marked(pid) and not self._is_exempt(pid)]

    def _is_marked(self, pid: int) -> bool:
        if pid == os.getpid():
            return False
        mark = self._mark.encode()
        return any(mark in _read(f"/proc/{pid}/{name}") for name in ("cmdline", "environ")) or self._is_at(pid)

    def _is_at(self, pid: int) -> bool:
        links = [f"/proc/{pid}/cwd"]
        with contextlib.suppress(OSError):
            links += [f"/proc/{pid}/fd/{number}" for number in os.listdir(f"/proc/{pid}/fd")]
        return any(self._mark in _target(link) for link in links)

    def deny_processes(self, room: int) -> str:
        """Do nothing: without a pids controller there is no limit for one trial alone."""
        del room
        return ""

    def kill(self) -> None:
        """Kill until nothing is found twice."""
        for _ in range(200):
            found = self.pids()
            if not found:
                return
            for pid in found:
                with contextlib.suppress(OSError):
                    descriptor = os.pidfd_open(pid)
                    if self._is_marked(pid):
                        _kill_and_close(descriptor)

    def remove(self) -> None:
        """Nothing was made."""


def _kill_and_close(descriptor: int) -> None:
    import signal  # noqa: PLC0415 - used when a trial has failed

    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    finally:
        os.close(descriptor)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


class Places:
    """The places of one run of the tool: cgroups if this user may make them, else marks."""

    def __init__(self, *, may_use_cgroups: bool = True) -> None:
        """Find out what can be done here."""
        name = f"harness-chaos-{os.getpid()}"
        self._root = _usable(_own_cgroup("cgroup2"), name) if may_use_cgroups else None
        self._pids_root = None
        if self._root is not None and not (self._root / "pids.max").exists():
            self._pids_root = _usable(_own_cgroup("cgroup", "pids"), name)
        self._number = 0
        self.method = "cgroup" if self._root is not None else "marks in /proc"

    def bystanders(self) -> list[str]:
        """Give where processes go that are not of a trial: the cgroup.procs of each hierarchy that is in use."""
        folders = [root / "bystanders" for root in (self._root, self._pids_root) if root is not None]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        return [str(folder / "cgroup.procs") for folder in folders]

    def new(self, name: str, directory: Path, is_exempt: Callable[[int], bool]) -> Place:
        """Make the place of one trial."""
        if self._root is None:
            return MarksPlace(directory, is_exempt)
        return CgroupPlace(self._root / name, self._pids_root / name if self._pids_root else None)

    def remove(self) -> None:
        """Remove what was made, once every trial has removed its own."""
        for root in (self._root, self._pids_root):
            if root is not None:
                for folder, _, _ in os.walk(root, topdown=False):
                    _remove_cgroup(Path(folder))


def _own_cgroup(kind: str, controller: str = "") -> Path | None:
    """Find this process's cgroup of version 2, or of a controller of version 1 (cgroups(7))."""
    entries = [line.split() for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    mounts = [
        entry[1] for entry in entries if entry[2] == kind and (not controller or controller in entry[3].split(","))
    ]
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == controller and mounts:
            return Path(mounts[0] + path)
    return None


def _usable(parent: Path | None, name: str) -> Path | None:
    """Make a cgroup and see whether a process may move there; None if not."""
    if parent is None:
        return None
    path = parent / name
    try:
        path.mkdir()
    except OSError:
        return None
    probe = subprocess.run(["/bin/sh", "-c", _ENTER, "enter", f"{path}/cgroup.procs", "true"], check=False, stderr=-3)
    if probe.returncode == 0:
        return path
    _remove_cgroup(path)
    return None


def wait_for(place: Place, timeout_s: float) -> None:
    """Wait until the place's emptiness may have changed, at most `timeout_s`."""
    if place.descriptor is None:
        time.sleep(min(timeout_s, _MARKS_POLL_S))
        return
    # Reading it is what takes note of its state; poll(2) then tells of what changes.
    if b"populated 0" in os.pread(place.descriptor, 256, 0):
        return
    poll = select.poll()
    poll.register(place.descriptor, select.POLLPRI)
    poll.poll(timeout_s * 1000)
