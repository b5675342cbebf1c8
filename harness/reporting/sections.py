"""What a test's report says of a server that it used."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from harness import logs, signals

if TYPE_CHECKING:
    from harness.messages import ServerStatus
    from harness.reporting.witness import Witness
    from harness.server import Server

LINES = 50
_FIRST_SEEN = 12
_LAST_SEEN = 12
_ENDS = {"asked": "stopped", "killed": "killed", "exited": "ended by itself"}


def section(server: Server, witness: Witness, *, with_log: bool = True) -> tuple[str, str]:
    """Give the title and the text of a server's section."""
    rows = _rows(server, witness)
    text = [f"{what:8} {value}".rstrip() for what, value in rows if value]
    text += _log(server, witness) if with_log else [f"{'log':8} {server.log_path} (shown above)"]
    return f"harness: server {server.name!r}: {headline(server, witness)}", "\n".join(text)


def headline(server: Server, witness: Witness) -> str:
    """Say in a few words how the server is, or how and when it ended."""
    status = witness.status(server)
    if status is None:
        return "its watchdog does not answer"
    if not status.root_exited and status.phase != "gone":
        return "running" + (f", {status.phase}" if status.phase != "running" else "")
    if not witness.has_failed(server):
        how = server.outcome.how if server.outcome is not None else "exited"
        return f"{_ENDS.get(how, how)}: {_exit(status)}"
    when = "during this test" if witness.died_in_test(server) else "before this test"
    why = witness.why(server)
    return f"DIED {when}: {_exit(status)}" + f" ({why})" * bool(why)


def _exit(status: ServerStatus) -> str:
    why = f" (stopped by the watchdog: {status.reason})" if status.reason else ""
    return signals.describe(status.returncode) + why


def _rows(server: Server, witness: Witness) -> list[tuple[str, str]]:
    status = witness.status(server)
    ports = ", ".join(f"{name} {port}" for name, port in server.ports_by_name.items())
    return [
        ("state", _state(server, status) if status is not None else "not known"),
        ("root", f"pid {server.pid}" + f"; ports: {ports}" * bool(ports)),
        ("gpus", ", ".join(server.gpus)),
        *_readiness(server),
    ]


def _state(server: Server, status: ServerStatus) -> str:
    now = time.monotonic()
    until = now if status.exited_at is None else status.exited_at
    parts = [status.phase, f"up {until - server.launched_at:.2f} s"]
    if status.root_exited:
        parts.append(_exit(status))
    if status.exited_at is not None:
        parts.append(f"exited {now - until:.2f} s ago")
    return ", ".join(parts)


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
