"""Does a fault to the processes it is for."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.chaos_count import Place
    from tools.chaos_people import Person
    from tools.chaos_plan import Fault

_DISK = "size=192k,nr_inodes=200,mode=0700"
_BLOCK_BYTES = 4096
_SIGUSR1_BIT = 1 << (signal.SIGUSR1 - 1)


class Disk:
    """The file system of a trial's state directory: a small tmpfs where this user may mount one."""

    def __init__(self, path: Path) -> None:
        """Mount it, if that can be done."""
        self._path = path
        path.mkdir()
        command = [shutil.which("mount") or "mount", "-t", "tmpfs", "-o", _DISK, "harness-chaos", str(path)]
        mounted = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.is_small = mounted.returncode == 0

    def fill(self) -> None:
        """Write until the kernel says that nothing is left."""
        with contextlib.suppress(OSError), open(self._path / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(_BLOCK_BYTES))

    def remove(self) -> None:
        """Unmount it."""
        if self.is_small:
            subprocess.run([shutil.which("umount") or "umount", "--lazy", str(self._path)], check=True)


def can_close_pipe(pid: int) -> bool:
    """Say whether a process has the handler with which it closes the Pipe."""
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) & _SIGUSR1_BIT)
    return False


def strike(fault: Fault, person: Person | None, place: Place, disk: Disk | None) -> str:
    """Do a fault, and say in what way where there are several."""
    if fault.kind == "no processes":
        return place.deny_processes(fault.amount) or _deny_processes(place)
    if fault.kind == "fill the log disk":
        return _fill(place, disk)
    if person is None:
        return "not at all"
    if fault.kind == "no descriptors":
        _limit_descriptors(person.pid, fault.amount)
    else:
        person.send(fault.signal or signal.SIGUSR1)
    return ""


def _fill(place: Place, disk: Disk | None) -> str:
    if disk is not None and disk.is_small:
        disk.fill()
        return "tmpfs"
    for pid in place.pids():
        with contextlib.suppress(OSError):  # it has ended
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]))
    return "RLIMIT_FSIZE"


def _deny_processes(place: Place) -> str:
    # The limit counts all processes of the user, so it is set to what forbids any more; it does not bind root.
    if os.geteuid() == 0:
        return "no processes: not at all (root, without a pids controller)"
    for pid in place.pids():
        with contextlib.suppress(OSError):  # it has ended
            resource.prlimit(pid, resource.RLIMIT_NPROC, (0, resource.prlimit(pid, resource.RLIMIT_NPROC)[1]))
    return "RLIMIT_NPROC"


def _limit_descriptors(pid: int, amount: int) -> None:
    with contextlib.suppress(OSError):  # it has ended
        now = len(os.listdir(f"/proc/{pid}/fd"))
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (max(0, now + amount), hard))


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
