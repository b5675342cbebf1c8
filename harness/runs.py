"""The directories of runs, `STATE/runs/PID-STARTTIME`, and the files of the ledger in them.

Little is imported here: every pytest process looks for what dead runs have left.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path

from harness import private

_RUN = re.compile(r"[1-9][0-9]{0,9}-[0-9]{1,19}")


def directories(state_dir: Path) -> list[Path]:
    """Give the directories of runs that are there, and nothing that is not one or that another user made."""
    found: list[Path] = []
    with contextlib.suppress(OSError):
        entries = os.scandir(_own_directory(state_dir / "runs"))
        found += [Path(entry.path) for entry in entries if _RUN.fullmatch(entry.name)]
        found = [path for path in found if _is_own_directory(path)]
    return sorted(found)


def _own_directory(path: Path) -> Path:
    if not _is_own_directory(path):
        raise NotADirectoryError(path)
    return path


def _is_own_directory(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def owner_of(run: Path) -> tuple[int, int]:
    """Give the pid and start time of the test process whose run this is."""
    pid, _, start_time = run.name.partition("-")
    return int(pid), int(start_time)


def entries(state_dir: Path) -> list[Path]:
    """Give the files of the ledger: one for each server that exists, or whose watchdog and keeper died."""
    found = []
    for run in directories(state_dir):
        with contextlib.suppress(OSError):
            names = [name for name in os.listdir(run) if name.startswith(private.ENTRY_PREFIX)]
            found += [run / name for name in sorted(names) if name.endswith(private.ENTRY_SUFFIX)]
    return found


def has_unheld_entries(state_dir: Path) -> bool:
    """Say whether an entry of the ledger is not held by a keeper: only such a one can be that of a dead run."""
    return any(not is_held(path) for path in entries(state_dir))


def is_held(path: Path) -> bool:
    """Say whether a keeper holds this entry: it does for as long as it lives."""
    try:
        descriptor = private.open_file(str(path), os.O_RDONLY)
    except OSError:
        return False  # removed meanwhile, or not ours: it is looked at more closely
    import fcntl  # noqa: PLC0415 - not there on every platform that can import this module

    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # a file system without locks
    finally:
        os.close(descriptor)
    return False
