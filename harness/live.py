"""What lives now: the watchdogs of this user, their servers and trees, as /proc and the ledger tell of them.

Nothing here asks a watchdog: one whose test process hangs, or that is stopped itself, is shown as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from harness import private, procfs
from harness.entries import Entry, Unreadable, read
from harness.errors import SpecError

_WATCHDOG = "harness-watchd"
_KEEPER = "harness-keeper"
_MIB = 1 << 20


@dataclass(frozen=True)
class Server:
    """One server; `pid` is its root's, None before it is up, and `processes` counts its whole tree.

    `memory_mib` is the sum of what is resident of each process (shared pages count in each), `ports` are those on which
    a process of the tree listens; None where they cannot be read.
    """

    name: str
    pid: int | None
    age_s: float
    processes: int
    memory_mib: float
    ports: list[int] | None
    log: str


@dataclass(frozen=True)
class LiveWatchdog:
    """One watchdog; `test` is "" where no test is known to run, `is_stopped` says that SIGSTOP holds it."""

    pid: int
    age_s: float
    test_process: int
    run: str
    test: str
    is_stopped: bool
    servers: list[Server] = field(default_factory=list)


def watchdogs() -> list[LiveWatchdog]:
    """Find every live watchdog of this user, the oldest first."""
    found = [stat for stat in map(procfs.stat, _pids()) if stat is not None and _is_watchdog(stat)]
    told = [_describe(stat) for stat in sorted(found, key=lambda stat: (stat.start_time, stat.pid))]
    return [watchdog for watchdog in told if watchdog is not None]


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _is_watchdog(stat: procfs.Stat) -> bool:
    if _log_of(stat) is None:
        return False
    # A keeper that has just been forked looks as its watchdog does.
    parent = procfs.stat(stat.parent)
    return parent is None or _log_of(parent) is None


def _log_of(stat: procfs.Stat) -> Path | None:
    """Give the log of a watchdog of this user; None for any other process."""
    if stat.state in "ZX" or procfs.name(stat.pid) != _WATCHDOG:
        return None
    try:
        if os.stat(f"/proc/{stat.pid}").st_uid != os.geteuid():
            return None
        *_, program, config, _ = Path(f"/proc/{stat.pid}/cmdline").read_bytes().split(b"\0")
        log = json.loads(config)["log"] if program.endswith(b"watchdog/boot.py") else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it has ended, or it is something else with that name
    return Path(log) if isinstance(log, str) else None


def _describe(stat: procfs.Stat) -> LiveWatchdog | None:
    log = _log_of(stat)
    if log is None:
        return None
    entries = _entries(log.parent, stat)
    keepers = [found for pid in procfs.children(stat.pid) if (found := procfs.stat(pid)) is not None]
    servers = [_server(keeper, entries) for keeper in keepers if procfs.name(keeper.pid) in {_KEEPER, _WATCHDOG}]
    pid = log.parent.name.partition("-")[0]
    return LiveWatchdog(
        pid=stat.pid,
        age_s=_age_s(stat),
        test_process=int(pid) if pid.isdigit() else 0,
        run=str(log.parent),
        test=running_test(log.parent),
        is_stopped=stat.state in "Tt",
        servers=servers,
    )


def _entries(run: Path, watchdog: procfs.Stat) -> list[Entry]:
    found: list[Entry] = []
    prefix = f"{private.ENTRY_PREFIX}{watchdog.pid}-{watchdog.start_time}-"
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(run)):
            if name.startswith(prefix) and name.endswith(private.ENTRY_SUFFIX):
                with contextlib.suppress(Unreadable):
                    found += [entry for entry in [read(run / name)] if entry is not None]
    return found


def _server(keeper: procfs.Stat, entries: list[Entry]) -> Server:
    who = (keeper.pid, keeper.start_time)
    entry = next((each for each in entries if each.keeper == who), None)
    tree = procfs.descendants(keeper.pid)
    root = entry.root.pid if entry is not None and entry.root is not None else None
    memory, ports = _resources(tree)
    return Server(
        name=entry.name if entry is not None else "",
        pid=root,
        age_s=_age_s(keeper),
        processes=len(tree),
        memory_mib=round(memory / _MIB, 1),
        ports=ports,
        log=entry.log if entry is not None else "",
    )


def _resources(tree: list[int]) -> tuple[int, list[int] | None]:
    memory = 0
    ports: list[set[int] | None] = []
    for process in map(_process, tree):
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                memory += process.memory_info().rss
                ports.append(_ports(process))
    known = [each for each in ports if each is not None]
    return memory, sorted(set().union(*known)) if len(known) == len(ports) else None


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None  # it has ended meanwhile


def _ports(process: psutil.Process) -> set[int] | None:
    # psutil 6.0 gave it another name.
    connections = getattr(process, "net_connections", None) or process.connections
    try:
        return {each.laddr.port for each in connections("inet") if each.status == psutil.CONN_LISTEN}
    except psutil.AccessDenied:
        return None  # another user's: a set-user-ID program


def _age_s(stat: procfs.Stat) -> float:
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - stat.start_time / os.sysconf("SC_CLK_TCK")
    return round(age, 1)


def running_test(run: Path) -> str:
    """Give the test that runs in the test process of a run, "" if none does or it is not known."""
    try:
        descriptor = private.open_file(str(run / private.TEST_FILE), os.O_RDONLY)
    except OSError:
        return ""
    try:
        return os.read(descriptor, private.LONGEST_TEST).decode(errors="replace")
    finally:
        os.close(descriptor)


# ---- ending them


def hold(pid: int) -> int:
    """Open a pidfd on a live watchdog of this user; raises SpecError if that pid is none."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        raise SpecError(f"{pid} is no watchdog of this user: there is no such process") from None
    stat = procfs.stat(pid)
    if stat is None or not _is_watchdog(stat):
        os.close(descriptor)
        raise SpecError(f"{pid} is no watchdog of this user (python -m harness ps shows them)")
    return descriptor


def ask(descriptor: int) -> None:
    """Tell a watchdog to stop all its servers and to end; one that is stopped is continued."""
    for number in (signal.SIGTERM, signal.SIGCONT):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, number)


def has_ended(descriptor: int, deadline: float) -> bool:
    """Wait for the end of a process, at most until the monotonic time `deadline`."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


def left_of(watchdog: LiveWatchdog) -> list[int]:
    """Give the keepers of a watchdog that has ended: each has a server that SIGKILL does not end."""
    keepers = []
    prefix = f"{private.ENTRY_PREFIX}{watchdog.pid}-"
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(watchdog.run)):
            with contextlib.suppress(Unreadable):
                entry = read(Path(watchdog.run) / name) if name.startswith(prefix) else None
                if entry is not None and entry.keeper is not None and procfs.is_alive(*entry.keeper):
                    keepers.append(entry.keeper.pid)
    return keepers
