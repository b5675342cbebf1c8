"""`python -m harness ps` and `stop`: what they print, and how they end."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

from harness import live
from harness.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from harness.live import LiveWatchdog, Server

_HEAD = f"  {'PID':>8}  {'AGE':>8}  {'PROCESSES':>9}  {'MEMORY':>11}  {'PORTS':20}  SERVER"
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


def table(watchdogs: Sequence[LiveWatchdog]) -> list[str]:
    """Give the lines that `ps` prints."""
    if not watchdogs:
        return ["no watchdog is running"]
    lines: list[str] = []
    for watchdog in watchdogs:
        lines += [_head(watchdog), *([_HEAD] if watchdog.servers else [])]
        lines += [_row(server) for server in watchdog.servers] or ["  no server"]
    return lines


def _head(watchdog: LiveWatchdog) -> str:
    stopped = ", stopped by a signal" if watchdog.is_stopped else ""
    test = f": {watchdog.test}" if watchdog.test else ""
    return f"watchdog {watchdog.pid}, {age(watchdog.age_s)}{stopped}, of process {watchdog.test_process}{test}"


def _row(server: Server) -> str:
    ports = "?" if server.ports is None else " ".join(map(str, server.ports)) or "-"
    pid = "-" if server.pid is None else str(server.pid)
    memory = f"{server.memory_mib:.1f} MiB"
    return f"  {pid:>8}  {age(server.age_s):>8}  {server.processes:>9}  {memory:>11}  {ports:20}  {server.name or '?'}"


def age(seconds: float) -> str:
    """Say how old something is, to two figures or so: `3.1 s`, `12 min`."""
    for unit_s, name in _UNITS:
        if seconds >= unit_s:
            return f"{seconds / unit_s:.0f} {name}"
    return f"{seconds:.1f} s"


def stop(pids: Sequence[int] | None, *, limit_s: float) -> tuple[list[dict[str, object]], bool]:
    """Have watchdogs stop their servers and end; give what came of each, and whether nothing is left.

    None stands for all. All are told before one is waited for. Raises SpecError, before anything is told, if one of the
    given pids is no watchdog's.
    """
    known = {watchdog.pid: watchdog for watchdog in live.watchdogs()}
    held: dict[int, int] = {}
    expected = (SpecError,) if pids is None else ()  # one of all may have ended meanwhile
    try:
        for pid in dict.fromkeys(known if pids is None else pids):
            with contextlib.suppress(*expected):
                held[pid] = _hold(pid, known)
        for descriptor in held.values():
            live.ask(descriptor)
        deadline = time.monotonic() + limit_s
        rows = [_outcome(known[pid], descriptor, deadline) for pid, descriptor in held.items()]
    finally:
        for descriptor in held.values():
            os.close(descriptor)
    return rows, all(row["outcome"] == "ended" for row in rows)


def _hold(pid: int, known: Mapping[int, LiveWatchdog]) -> int:
    if pid not in known:
        raise SpecError(f"{pid} is no watchdog of this user (python -m harness ps shows them)")
    return live.hold(pid)


def _outcome(watchdog: LiveWatchdog, descriptor: int, deadline: float) -> dict[str, object]:
    has_ended = live.has_ended(descriptor, deadline)
    left = live.left_of(watchdog, deadline) if has_ended else []
    outcome = "survivors" if left else "ended" if has_ended else "still stopping"
    return {"watchdog": watchdog.pid, "servers": len(watchdog.servers), "outcome": outcome, "keepers": left}


def stop_line(row: dict[str, object]) -> str:
    """Give the line that `stop` prints of one watchdog."""
    text = f"watchdog {row['watchdog']}, {row['servers']} servers: {row['outcome']}"
    return f"{text} (keepers {row['keepers']})" if row["keepers"] else text
