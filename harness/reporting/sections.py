"""What a test's report says of a server that it used."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from harness import logs, signals
from harness.errors import HarnessError
from harness.reporting.witness import has_failed

if TYPE_CHECKING:
    from harness.reporting.witness import Witness
    from harness.server import Server

LINES = 50
_FIRST_SEEN = 12
_LAST_SEEN = 12


def section(server: Server, witness: Witness, *, with_log: bool = True) -> tuple[str, str]:
    """Give the title and the text of a server's section; never raises what the harness raises."""
    try:
        headline, rows = _headline(server, witness), _rows(server)
    except HarnessError as error:
        headline, rows = "its state is not known", [("state", error.message)]
    text = [f"{what:8} {value}" for what, value in rows if value]
    text += _log(server, witness) if with_log else [f"{'log':8} {server.log_path} (its last lines are shown above)"]
    return f"harness: server {server.name!r}: {headline}", "\n".join(text)


def _headline(server: Server, witness: Witness) -> str:
    status = server.status()
    if not status.root_exited and status.phase != "gone":
        return "running" + (f", {status.phase}" if status.phase != "running" else "")
    if not has_failed(server):
        how = server.outcome.how if server.outcome is not None else "exited"
        done = {"asked": "stopped", "killed": "killed", "exited": "ended by itself"}.get(how, how)
        return f"{done}: {server.describe_exit()}"
    when = "during this test" if witness.died_in_test(server) else "before this test"
    why = witness.why(server)
    return f"DIED {when}: {server.describe_exit()}" + f" ({why})" * bool(why)


def _rows(server: Server) -> list[tuple[str, str]]:
    status = server.status()
    until = status.exited_at if status.exited_at is not None else time.monotonic()
    ports = ", ".join(f"{name} {port}" for name, port in server.ports_by_name.items())
    since = f"exited {time.monotonic() - until:.2f} s ago" if status.exited_at is not None else ""
    up = f"up {until - server.launched_at:.2f} s"
    tree = "" if status.phase == "gone" else f", {len(server.pids())} processes"
    return [
        ("state", f"{status.phase}, " + ", ".join(part for part in (_exit(server), up, since) if part) + tree),
        ("root", f"pid {server.pid}" + f"; ports: {ports}" * bool(ports)),
        ("gpus", ", ".join(server.gpus)),
        *_readiness(server),
    ]


def _exit(server: Server) -> str:
    return signals.describe(server.returncode) if server.status().root_exited else ""


def _readiness(server: Server) -> list[tuple[str, str]]:
    history = server.readiness
    if not history.is_awaited:
        return [("ready", "nothing was waited for")]
    how = "ready" if history.is_ready else f"NOT ready (at most {history.limit_s:g} s)"
    seen = [f"after {at:8.2f} s: {text}" for at, text in history.seen]
    if len(seen) > _FIRST_SEEN + _LAST_SEEN:
        left_out = len(seen) - _FIRST_SEEN - _LAST_SEEN
        seen[_FIRST_SEEN:-_LAST_SEEN] = [f"... {left_out} more ..."]
    return [("ready", f"{how}, waiting for {server.ready!r}"), *[("", text) for text in seen]]


def _log(server: Server, witness: Witness) -> list[str]:
    lines = logs.tail_since(server.log_path, LINES, witness.written_before(server))
    head = f"{'log':8} {server.log_path}"
    if not lines:
        return [f"{head} (empty)"]
    some = any(is_new for is_new, _ in lines)
    marked = "'>': written during this test" if some else "nothing of it was written during this test"
    return [f"{head} (the last {len(lines)} lines; {marked})", *[f"{'>' * new:2}| {line}" for new, line in lines]]


def last_line(server: object) -> str:
    """Give the last line of a server's log that holds something, "" if there is none."""
    path = getattr(server, "log_path", None)
    with contextlib.suppress(IndexError):
        return [line for _, line in logs.tail_since(path, LINES, 0) if line.strip()][-1] if path is not None else ""
    return ""
