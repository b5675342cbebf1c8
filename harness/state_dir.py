"""The state directory: where it is, and that nobody else can have planted it."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from pathlib import Path

from harness import private, procfs, runs
from harness.errors import HarnessError

# A start of pytest must not wait for long for what a dead run has left.
_END_REMAINS_S = 3.0
# Logs of a run that died are kept this long, so that somebody can read them.
_KEEP_S = 24 * 3600.0


def find(given: str | os.PathLike[str] | None = None, *, make: bool = True) -> Path:
    """Give the state directory, made with mode 0700 if it is missing and `make` says so.

    It is `given`, else $HARNESS_STATE_DIR, else $XDG_RUNTIME_DIR/harness, else /tmp/harness-UID. Raises HarnessError if
    it is a link, not a directory, another user's, or one that others may enter: it may be one that they need.
    """
    path = Path(given) if given is not None else default()
    try:
        if make:
            path.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        what = "make" if make else "look at"
        raise HarnessError(f"cannot {what} the state directory {path}: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise HarnessError(f"the state directory {path} is a link or a file: remove it, or set HARNESS_STATE_DIR")
    if found.st_uid != os.geteuid():
        raise HarnessError(f"the state directory {path} belongs to user {found.st_uid}: set HARNESS_STATE_DIR")
    if stat.S_IMODE(found.st_mode) & (stat.S_IRWXG | stat.S_IRWXO):
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        raise HarnessError(
            f"the state directory {path} has mode {mode}, so others can get in: set HARNESS_STATE_DIR to a directory"
            " of your own with mode 0700"
        )
    return path.absolute()


def default() -> Path:
    """Give the place of the state directory where none is given; it may not be there yet."""
    if named := os.environ.get("HARNESS_STATE_DIR"):
        return Path(named)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "harness"
    return Path(f"/tmp/harness-{os.geteuid()}")  # noqa: S108 - the owner and mode are checked


def new_run(given: str | os.PathLike[str] | None = None) -> Path:
    """Give the directory of this process's run; end what dead runs have left, and remove old ones' directories.

    Raises what `find` raises.

    It is named by pid and start time, and so unique, and is not made yet: a run without servers writes nothing.
    """
    directory = find(given)
    prune(directory)
    if runs.has_unheld_entries(directory):
        from harness import remains  # noqa: PLC0415 - every pytest process comes here; hardly any finds remains

        with contextlib.suppress(OSError):  # the next run tries again
            remains.end(directory, limit_s=_END_REMAINS_S)
    return run_of(os.getpid(), directory)


def run_of(pid: int, directory: Path | None = None) -> Path:
    """Give the directory of the run of a process that is alive."""
    found = procfs.stat(pid)
    return (directory or find()) / "runs" / f"{pid}-{found.start_time if found else 0}"


def prune(state_dir: Path) -> None:
    """Remove the directories of runs whose process has ended more than a day ago."""
    for run in runs.directories(state_dir):
        if procfs.is_alive(*runs.owner_of(run)):
            continue
        with contextlib.suppress(OSError):  # another process prunes as well
            if any(name.endswith(private.ENTRY_SUFFIX) for name in os.listdir(run)):
                continue  # something of it may still be there
            if time.time() - max(path.lstat().st_mtime for path in (run, *run.iterdir())) > _KEEP_S:
                shutil.rmtree(run, ignore_errors=True)
