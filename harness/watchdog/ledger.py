"""The ledger: a file for each server that exists, so that what a watchdog and a keeper leave behind can be found.

An entry is written before the keeper is forked and removed when the tree is gone: there is no instant at which a server
exists unrecorded. Facts are appended, a line of JSON each: a line that is torn by a crash or a full disk loses itself
alone. The keeper holds a lock (flock(2)) on the entry for as long as it lives. Nothing here raises: a server is
launched without an entry rather than not at all. `harness.entries` reads what is written here.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat

from harness import private, procfs
from harness.watchdog import cgroups

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from harness.messages import Launch
    from harness.watchdog.log import Log

VERSION = 1
# The variable in a server's environment that says which entry is its own.
MARK = "HARNESS_SERVER"
_FRESH = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LONGEST_NAME = 200
_MOST_MEMBERS = 10_000


class Ledger:
    """The entries of one watchdog, and its cgroup. Until the first launch it touches nothing."""

    def __init__(self, run: str, client: int, log: Log, *, use_cgroups: bool) -> None:
        """Take the directory of the run, the test process's pid, and whether cgroups may be used."""
        self._run = run
        self._client = client
        self._log = log
        self._use_cgroups = use_cgroups
        self._descriptor = -1
        self._facts: dict[str, object] | None = None
        me = procfs.stat(os.getpid())
        self._me = [os.getpid(), me.start_time if me else 0]
        self._place = cgroups.Place("", "HARNESS_CGROUP is off")

    def open(self, key: int, launch: Launch) -> Entry:
        """Record a server that is about to be started, and make its cgroup."""
        if self._facts is None:
            self._facts = self._look()
        # A test process may have several watchdogs, each of which counts its servers from 1.
        name = "-".join(map(str, [*self._me, key]))
        mark = f"{os.path.basename(self._run)}/{name}/{os.urandom(8).hex()}"
        cgroup, inode = self._new_cgroup(key)
        entry = Entry(f"{self._run}/{private.ENTRY_PREFIX}{name}{private.ENTRY_SUFFIX}", mark, cgroup, self._log)
        facts = {"name": launch.name[:_LONGEST_NAME], "mark": mark, "log": launch.log_path, "cgroup": [cgroup, inode]}
        try:
            entry.create(self._directory(), {"version": VERSION, **self._facts, **facts})
        except OSError as error:
            self._log.write(f"cannot record {entry.path}: {error.strerror}")
        return entry

    def _directory(self) -> int:
        # Kept open: to look for it at every launch would cost more than the rest. A cleaner may have removed it.
        if self._descriptor < 0 or os.fstat(self._descriptor).st_nlink == 0:
            self._descriptor = private.open_run(self._run, make=True)
        return self._descriptor

    def _look(self) -> dict[str, object]:
        try:
            if self._use_cgroups:
                _remove_abandoned()
                self._place = cgroups.make("-".join(map(str, ["harness", *self._me])))
            client = procfs.stat(self._client)
            facts: dict[str, object] = {"boot": boot(), "namespace": namespace()}
        except OSError as error:
            # A sandbox may hide some of /proc; an entry that lacks this is not believed.
            self._log.write(f"the ledger is not complete: {error.strerror}")
            return {}
        if not self._place.directory:
            self._log.write(f"servers get no cgroup of their own: {self._place.reason}")
        who = [self._client, client.start_time if client else 0]
        return {**facts, "client": who, "watchdog": self._me}

    def _new_cgroup(self, key: int) -> tuple[str, int]:
        if not self._place.directory:
            return "", 0
        path = f"{self._place.directory}/{key}"
        try:
            os.mkdir(path)
            return path, os.stat(path).st_ino
        except OSError as error:
            self._log.write(f"cannot make the cgroup {path}: {error.strerror}")
            return "", 0

    def close(self) -> None:
        """Remove the watchdog's cgroup, which is empty by now."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._place.directory:
            cgroups.remove(self._place.directory)


class Entry:
    """One server in the ledger. The watchdog makes it; after the fork its keeper holds it as well."""

    def __init__(self, path: str, mark: str, cgroup: str, log: Log) -> None:
        """Take what is known before the server exists; `cgroup` is "" where there is none."""
        self.path = path
        self.mark = mark
        self.cgroup = cgroup
        self.log = log
        self.descriptor = -1

    def create(self, run: int, facts: dict[str, object]) -> None:
        """Make the entry's file, which is never seen without its first line; raises OSError, and there is none then."""
        name = os.path.basename(self.path)
        fresh = f"{name}.new"
        descriptor = os.open(fresh, _FRESH, 0o600, dir_fd=run)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._write(descriptor, json.dumps(facts) + "\n")
            os.rename(fresh, name, src_dir_fd=run, dst_dir_fd=run)
        except OSError:
            os.close(descriptor)
            os.unlink(fresh, dir_fd=run)
            raise
        self.descriptor = descriptor

    def note_root(self, keeper: int, root: int, log: int) -> None:
        """Add who the keeper and the root are, and which file the descriptor `log` is; for the keeper."""
        found = os.fstat(log)
        who = [[pid, each.start_time] for pid in (keeper, root) if (each := procfs.stat(pid)) is not None]
        # Who has a device or a FIFO open has nothing to do with the server for that.
        file = f', "file": {[found.st_dev, found.st_ino]}' if stat.S_ISREG(found.st_mode) else ""
        if len(who) == 2:  # noqa: PLR2004 - both; the root is a child of the caller, which has not reaped it
            self._append(f'{{"keeper": {who[0]}, "root": {who[1]}{file}}}')

    def note_members(self, pids: Iterable[int]) -> None:
        """Add who is in the tree now; for whoever sees that the other one of watchdog and keeper has died."""
        found = [each for each in map(procfs.stat, pids) if each is not None and each.state not in "ZX"]
        members = [[each.pid, each.start_time] for each in found[:_MOST_MEMBERS]]
        if members:
            self._append(f'{{"members": {members}}}')

    def _append(self, line: str) -> None:
        # Plain text: JSON's encoder would cost every keeper 0.2 MiB. The first line break ends a line that was torn.
        try:
            descriptor = self.descriptor
            if descriptor < 0:
                descriptor = private.open_file(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                self._write(descriptor, f"\n{line}\n")
            finally:
                if self.descriptor < 0:
                    os.close(descriptor)
        except OSError as error:
            self._fail(error)

    @staticmethod
    def _write(descriptor: int, text: str) -> None:
        data = text.encode()
        if os.write(descriptor, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Let go of the file; in the watchdog, once the keeper holds it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def kill(self) -> None:
        """Send SIGKILL to all that is in the server's cgroup, at once."""
        if self.cgroup:
            cgroups.kill(self.cgroup)

    def remove(self) -> None:
        """Remove the entry and the cgroup: nothing of the server is left."""
        if self.cgroup and not cgroups.remove(self.cgroup):
            self.log.write(f"the cgroup {self.cgroup} is not empty: a process of another tree is in it")
        self._unlink(self.path)

    def remove_watchdogs_cgroup(self) -> None:
        """Remove the cgroup of the watchdog, which has died, if this server's was the last one in it."""
        if self.cgroup:
            cgroups.remove_empty(os.path.dirname(self.cgroup))

    def _fail(self, error: OSError) -> None:
        self.log.write(f"cannot write {os.path.basename(self.path)}: {error.strerror}")

    @staticmethod
    def _unlink(path: str) -> None:
        try:
            os.unlink(path)
        except OSError:
            return


def boot() -> str:
    """Give the id of this boot of the machine: start times are counted from it (random(4))."""
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return file.read().decode().strip()


def namespace() -> str:
    """Give the PID namespace, in which alone a pid means anything (pid_namespaces(7))."""
    return os.readlink("/proc/self/ns/pid")


def _remove_abandoned() -> None:
    # A watchdog that was killed when it had no server, or with all its keepers, has left its cgroup, which is empty.
    above = cgroups.own().directory
    try:
        names = [name for name in os.listdir(above) if name.startswith("harness-")] if above else []
    except OSError:
        return
    for name in names:
        pid, _, start_time = name.removeprefix("harness-").partition("-")
        is_ours = pid.isascii() and pid.isdigit() and start_time.isascii() and start_time.isdigit()
        if is_ours and not procfs.is_alive(int(pid), int(start_time)):
            cgroups.remove(f"{above}/{name}")
