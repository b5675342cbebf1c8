"""What the harness finds on this machine: one finding for each thing that it needs or makes use of."""

from __future__ import annotations

import os
import stat
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness import forking, leasing, platform, procfs, remains, state_dir
from harness.broker import book
from harness.broker.readings import Fault
from harness.broker.store import Store, StoreError
from harness.errors import HarnessError
from harness.watchdog import ledger

if TYPE_CHECKING:
    from pathlib import Path

    from harness.broker.readings import Reading

# A server costs its watchdog three descriptors, and at least two processes.
_FEW_DESCRIPTORS = 1024
_FEW_PROCESSES = 256
# More than an entry of the ledger, and than the stacks of most tests.
_WRITTEN_BYTES = 1 << 16
# NVML's start takes seconds where nothing keeps the driver loaded.
_SURVEY_S = 5.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `advice` says what to do where it is not fine, or could be better."""

    what: str
    is_fine: bool
    text: str
    advice: str = ""

    def line(self) -> str:
        """Give it in one line."""
        advice = f" -> {self.advice}" if self.advice else ""
        return plain(f"{'ok ' if self.is_fine else 'BAD'}  {self.what}: {self.text}{advice}")


def plain(text: object) -> str:
    """Show what a process may have chosen itself: it must not steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


def examine(given_state_dir: str | None = None) -> list[Finding]:
    """Look at everything. Nothing is left changed, but that a missing state directory is made, as a run would."""
    found = [_platform()]
    if not found[0].is_fine:
        return found
    found += [
        _kernel(),
        _kill_path(),
        _limit("RLIMIT_NOFILE", _FEW_DESCRIPTORS),
        _limit("RLIMIT_NPROC", _FEW_PROCESSES),
    ]
    try:
        directory = state_dir.find(given_state_dir)
    except HarnessError as error:
        return [*found, Finding("state directory", is_fine=False, text=str(error))]
    return [*found, _state_dir(directory), _lock(directory), *_remains(directory), *_nvml(), _gpu_store(directory)]


def _platform() -> Finding:
    try:
        platform.check()
    except HarnessError as error:
        return Finding("platform", is_fine=False, text=str(error), advice="run on Linux 5.4 or newer")
    return Finding("platform", is_fine=True, text="pidfds, subreapers and /proc/PID/task/TID/children are there")


def _kernel() -> Finding:
    return Finding("kernel", is_fine=True, text=f"{os.uname().sysname} {os.uname().release}")


def _kill_path() -> Finding:
    from harness.watchdog import cgroups  # noqa: PLC0415 - only where the platform is Linux

    sweep = "the sweep is in force: round after round until the kernel says that nothing is left"
    try:
        if not forking.may_use_cgroups():
            return Finding("kill path", is_fine=True, text=f"{sweep} (HARNESS_CGROUP=off)")
    except HarnessError as error:
        return Finding("kill path", is_fine=False, text=str(error))
    me = procfs.stat(os.getpid())
    place = cgroups.make(f"harness-{os.getpid()}-{me.start_time if me else 0}")
    reason = place.reason
    if place.directory:
        reason = _try_to_enter(place.directory)
        cgroups.remove(place.directory)
    if not reason:
        return Finding("kill path", is_fine=True, text=f"cgroup.kill, below {os.path.dirname(place.directory)}")
    advice = "systemd-run --user --scope -p Delegate=yes COMMAND gives a cgroup in which a server is killed at once"
    return Finding("kill path", is_fine=True, text=f"{sweep} ({reason})", advice=advice)


def _try_to_enter(directory: str) -> str:
    """Have a child be born in a cgroup, as a server would; give the reason if it cannot."""
    from harness.watchdog import kernel  # noqa: PLC0415 - only where the platform is Linux

    try:
        child = kernel.fork_into(directory)
    except OSError as error:
        return f"no process can be started in a cgroup: {error.strerror}"
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return ""


def _limit(name: str, few: int) -> Finding:
    import resource  # noqa: PLC0415 - not there on every platform that can import this module

    soft, hard = resource.getrlimit(getattr(resource, name))
    shown = ["unlimited" if value == resource.RLIM_INFINITY else str(value) for value in (soft, hard)]
    is_enough = hard == resource.RLIM_INFINITY or hard >= few
    advice = "" if is_enough else f"raise it to {few} or more: few servers can be launched"
    return Finding(name, is_fine=is_enough, text=f"{shown[0]} (at most {shown[1]})", advice=advice)


def _state_dir(directory: Path) -> Finding:
    found = directory.stat()
    text = f"{directory}, of user {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o}"
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(_WRITTEN_BYTES))
    except OSError as error:
        advice = "make room, or set HARNESS_STATE_DIR to a directory that can be written to"
        return Finding("state directory", is_fine=False, text=f"{text}: {error.strerror}", advice=advice)
    return Finding("state directory", is_fine=True, text=text)


def _lock(directory: Path) -> Finding:
    try:
        import filelock  # noqa: PLC0415 - 90 ms

        with filelock.FileLock(directory / "doctor.lock", timeout=1.0, fallback_to_soft=False):
            return Finding("file locks", is_fine=True, text="filelock works in the state directory")
    except ImportError as error:
        return Finding("file locks", is_fine=False, text=str(error), advice="pip install filelock")
    except (OSError, NotImplementedError) as error:
        advice = "set HARNESS_STATE_DIR to a directory on a local file system"
        return Finding("file locks", is_fine=False, text=f"filelock fails: {error}", advice=advice)


def _remains(directory: Path) -> list[Finding]:
    found = remains.find(directory)
    left = sum(map(len, found.processes.values()))
    advice = f"python -m harness sweep --yes --state-dir {directory} ends them" if left else ""
    text = f"dead runs have left {left or 'no'} process{'es' if left != 1 else ''}"
    findings = [Finding("ledger", is_fine=not left, text=text, advice=advice)]
    for path, reason in found.unreadable.items():
        findings.append(Finding("ledger", is_fine=False, text=f"{path}: {reason}", advice="look at it, and remove it"))
    return findings


def _nvml() -> list[Finding]:
    from harness.broker import survey  # noqa: PLC0415 - only where the platform is Linux

    seen = survey.survey(_SURVEY_S)
    if seen.failure:
        return [Finding("NVML", is_fine=seen.is_absent, text=seen.failure)]
    return [_device(device.uuid, device.name, seen.readings[device.uuid]) for device in seen.devices] or [
        Finding("NVML", is_fine=True, text="the driver is there, but no GPU")
    ]


def _device(uuid: str, name: str, reading: Reading | Fault) -> Finding:
    what = f"GPU {uuid}"
    if isinstance(reading, Fault):
        advice = "nvidia-smi -q says more; a GPU that is lost needs a reset or a reboot"
        return Finding(what, is_fine=False, text=f"{name} cannot be read: {reading.text}", advice=advice)
    text = f"{name}, {reading.used_bytes >> 20} of {reading.total_bytes >> 20} MiB in use"
    if reading.processes is None:
        return Finding(
            what, is_fine=True, text=f"{text}; by whom is not told, so a neighbour may make a verdict unknown"
        )
    return Finding(what, is_fine=True, text=f"{text} by {_count(len(reading.processes), 'process', 'es')}")


def _gpu_store(directory: Path) -> Finding:
    terms = leasing.terms(directory, wait_s=0.0, release_s=0.0)
    store = Store(terms.store, is_shared=terms.is_shared)
    try:
        # Only who tries knows whether a shared directory can be written to; what is made there a run would make.
        content = store.change(lambda found: (found, found), timeout_s=1.0) if terms.is_shared else store.read()
        found = book.forget_other_boot(book.Book.from_json_dict(content), ledger.boot())
    except (StoreError, ValueError) as error:
        return Finding("GPU store", is_fine=False, text=str(error))
    counts = f"{_count(len(found.leases), 'lease', 's')}, {len(found.waiters)} waiting"
    text = f"{terms.store}: {counts}, {len(found.quarantines)} quarantined"
    advice = "python -m harness gpus says why, and --release lifts it" if found.quarantines else ""
    return Finding("GPU store", is_fine=not found.quarantines, text=text, advice=advice)


def _count(number: int, what: str, plural: str) -> str:
    return f"{number} {what}{'' if number == 1 else plural}"
