"""Stops of servers of one watchdog, all in parallel, and what is told of one while it goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness import journal, messages
from harness.outcomes import outcome_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.link import Link
    from harness.server import Server


def stop(link: Link, servers: Sequence[Server], limit_s: float | None, *, kill: bool = False) -> messages.Stopped:
    """Stop servers that have not ended; return when no process of them is left.

    `limit_s` overrides each server's grace; `kill` asks none of them first.
    """
    grace_s = 0.0 if kill else limit_s or max(server.grace_s for server in servers)
    request = messages.Stop([server.key for server in servers], limit_s, kill=kill)
    wait = journal.Wait("stop", [server.name for server in servers], grace_s)
    try:
        stopped = link.request(
            request,
            messages.Stopped,
            timeout_s=grace_s + link.memory_s,
            meanwhile=lambda: _say_what_is_awaited(wait, servers, grace_s),
        )
    finally:
        wait.end()
    record(servers, stopped)
    return stopped


def _say_what_is_awaited(wait: journal.Wait, servers: Sequence[Server], grace_s: float) -> None:
    if wait.is_due:
        what = "exit after SIGTERM" if wait.seconds < grace_s else "end after SIGKILL"
        gpus = ", and GPU memory" if any(server.gpus for server in servers) else ""
        wait.say(what + gpus, servers[0].log_path)


def record(servers: Sequence[Server], stopped: messages.Stopped) -> None:
    """Keep the outcome of each server that a stop reports."""
    by_key = {outcome.key: outcome for outcome in stopped.outcomes}
    ending = [server for server in servers if server.key in by_key and not server.has_ended]
    for server in servers:
        if server.key in by_key:
            server.record(outcome_of(by_key[server.key]))
    if len(ending) > 1:
        one_by_one_s = sum(by_key[server.key].seconds for server in ending)
        times = {"seconds": round(stopped.seconds, 6), "one_by_one_s": round(one_by_one_s, 6)}
        journal.note("stopped", servers=[server.name for server in ending], **times)
