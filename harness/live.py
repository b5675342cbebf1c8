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
_PAUSE_S = 0.05
# poll(2) counts milliseconds in 31 bits, and Python raises OverflowError for more.
_LONGEST_POLL_S = 86400.0


@dataclass(frozen=True)
class Server:
    """One server; `pid` is its root's, None before it is up and when it has exited.

    `processes` counts its whole tree, `memory_mib` is the sum of what is resident of each (shared pages count in each),
    `ports` are those on which a process of the tree listens; None where they cannot be read.
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
    # A keeper that has just been forked looks as its watchdog does, and so does a root until it executes its program.
    mine = _command_line(stat.pid)
    return mine != _command_line(stat.parent)


def _log_of(stat: procfs.Stat) -> Path | None:
    """Give the log of a watchdog of this user; None for any other process."""
    if stat.state in "ZX" or procfs.name(stat.pid) != _WATCHDOG:
        return None
    try:
        if os.stat(f"/proc/{stat.pid}").st_uid != os.geteuid():
            return None
        *_, program, config, _ = _command_line(stat.pid).split(b"\0")
        log = json.loads(config)["log"] if program.endswith(b"watchdog/boot.py") else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it has ended, or it is something else with that name
    return Path(log) if isinstance(log, str) else None


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _describe(stat: procfs.Stat) -> LiveWatchdog | None:
    log = _log_of(stat)
    if log is None:
        return None
    entries = _entries(log.parent, stat.pid)
    children = [found for pid in procfs.children(stat.pid) if (found := procfs.stat(pid)) is not None]
    keepers = [found for found in children if procfs.name(found.pid) in {_KEEPER, _WATCHDOG}]
    servers = [server for keeper in keepers if (server := _server(keeper, entries)) is not None]
    pid = log.parent.name.partition("-")[0]
    return LiveWatchdog(
        pid=stat.pid,
        age_s=round(procfs.age_s(stat), 1),
        test_process=int(pid) if pid.isdigit() else 0,
        run=str(log.parent),
        test=running_test(log.parent),
        is_stopped=stat.state in "Tt",
        servers=servers,
    )


def _entries(run: Path, watchdog: int) -> list[Entry]:
    found: list[Entry] = []
    prefix = f"{private.ENTRY_PREFIX}{watchdog}-"
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(run)):
            if name.startswith(prefix) and name.endswith(private.ENTRY_SUFFIX):
                with contextlib.suppress(Unreadable):
                    found += [entry for entry in [read(run / name)] if entry is not None]
    return found


def _server(keeper: procfs.Stat, entries: list[Entry]) -> Server | None:
    who = (keeper.pid, keeper.start_time)
    entry = next((each for each in entries if each.keeper == who), None)
    tree = procfs.descendants(keeper.pid)
    if entry is None and not tree:
        return None  # a keeper that is on its way in or out, which removes its entry: it has no server
    root = entry.root if entry is not None else None
    memory, ports = _resources(tree)
    return Server(
        name=entry.name if entry is not None else "",
        pid=root.pid if root is not None and procfs.is_alive(*root) else None,
        age_s=round(procfs.age_s(keeper), 1),
        processes=len(tree),
        memory_mib=round(memory / _MIB, 1),
        ports=ports,
        log=entry.log if entry is not None else "",
    )


def _resources(tree: list[int]) -> tuple[int, list[int] | None]:
    memory = 0
    ports: list[set[int] | None] = []
    for pid in tree:
        found = procfs.stat(pid)
        if found is None or found.state in "ZX":
            continue  # of a zombie nothing can be read but by root, and it has nothing
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            ports.append(_ports(process))
            memory += _memory(process)
    known = [each for each in ports if each is not None]
    return memory, sorted(set().union(*known)) if len(known) == len(ports) else None


def _memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except (psutil.AccessDenied, OSError):
        return 0


def _ports(process: psutil.Process) -> set[int] | None:
    # psutil 6.0 gave it another name.
    connections = getattr(process, "net_connections", None) or process.connections
    try:
        return {each.laddr.port for each in connections("inet") if each.status == psutil.CONN_LISTEN}
    except (psutil.AccessDenied, OSError):
        return None  # another user's: a set-user-ID program


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
    while True:
        left_s = deadline - time.monotonic()
        if poll.poll(min(max(0.0, left_s), _LONGEST_POLL_S) * 1000):
            return True
        if left_s <= 0:
            return False


def left_of(watchdog: LiveWatchdog, deadline: float) -> list[int]:
    """Give the keepers that a watchdog which has ended left: those of servers that SIGKILL does not end.

    Where it was killed its keepers still stop their servers: they are waited for until the monotonic time `deadline`.
    """
    while (keepers := _keepers_of(watchdog)) and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)
    return keepers


def _keepers_of(watchdog: LiveWatchdog) -> list[int]:
    keepers = [entry.keeper for entry in _entries(Path(watchdog.run), watchdog.pid) if entry.keeper is not None]
    return [keeper.pid for keeper in keepers if procfs.is_alive(*keeper)]
