"""The named steps at which a fault can strike: in which process each one is, and which call marks it.

Nothing in the product knows of them: `chaos_hooks` wraps the call in the process that a trial has chosen. Some steps
have no call of their own (`place` is ""); `chaos_plugin` or `chaos_case` says when they are reached.
"""

from __future__ import annotations

from harness.records import Record

PYTEST = "pytest"
WORKER = "worker"
WATCHDOG = "watchdog"
KEEPER = "keeper"
TARGETS = (PYTEST, WORKER, WATCHDOG, KEEPER)

_NO_KEEPER = (PYTEST, WORKER, WATCHDOG)


class Step(Record):
    """One step. `most`: how often it surely comes, "once" in a run or once for each of its "servers"."""

    name: str
    is_in_client: bool
    place: str
    is_after: bool
    targets: tuple[str, ...]
    most: str
    is_while_stopping: bool


def _client(
    name: str,
    place: str = "",
    *,
    is_after: bool = False,
    targets: tuple[str, ...] = TARGETS,
    most: str = "servers",
    is_while_stopping: bool = False,
) -> Step:
    return Step(name, True, place, is_after, targets, most, is_while_stopping)


def _watchdog(
    name: str,
    place: str,
    *,
    is_after: bool = False,
    targets: tuple[str, ...] = TARGETS,
    most: str = "servers",
    is_while_stopping: bool = False,
) -> Step:
    return Step(name, False, f"harness.watchdog.{place}", is_after, targets, most, is_while_stopping)


_STEPS = (
    # The watchdog's start: in the child of the fork, in the test process after it, in the new program.
    _client("watchdog is forked (child)", "harness.forking:_close_all_but", targets=_NO_KEEPER, most="once"),
    _client("watchdog is forked (parent)", "harness.forking:_fork", targets=_NO_KEEPER, most="once", is_after=True),
    _client("watchdog executes its program", "harness.forking:_reset_signals", targets=_NO_KEEPER, most="once"),
    _watchdog("watchdog's program starts", "kernel:become_subreaper", targets=_NO_KEEPER, most="once"),
    _watchdog("watchdog's loop starts", "loop:Loop.run", targets=_NO_KEEPER, most="once"),
    # A launch.
    _client("a frame is half sent", targets=_NO_KEEPER),
    _client("between request and reply"),
    _watchdog("launch is read", "loop:Loop._spawn", targets=_NO_KEEPER),
    _watchdog("keeper is forked (parent)", "kept:_fork", is_after=True),
    _watchdog("keeper is forked (child)", "keeper:kernel.close_all_but"),
    _watchdog("keeper has let go", "keeper:_isolate", is_after=True),
    _watchdog("root is forked (parent)", "spawn:fork_root", is_after=True),
    _watchdog("root is forked (child)", "spawn:_execute"),
    _watchdog("root executes its program", "spawn:_restore_signals"),
    _watchdog("keeper sees the root start", "keeper:_Keeper._see_start"),
    _watchdog("between spawn and reply", "loop:Loop._answer", most="once"),
    # Readiness, and the servers at work.
    _client("waiting for readiness"),
    _client("the servers are up", most="once"),
    # A stop.
    _client("between stop and reply", most="once", is_while_stopping=True),
    _watchdog("among the asks", "kept:Kept.ask_root", is_after=True, most="once", is_while_stopping=True),
    _watchdog("keeper gets an order", "keeper:_Keeper._read_order", is_while_stopping=True),
    _watchdog("kill is ordered", "loop:Loop._kill", most="once", is_while_stopping=True),
    _watchdog("before the kill", "keeper:_Keeper._kill_top", is_while_stopping=True),
    _watchdog("in the kill", "sweep:_strike_groups", is_after=True, is_while_stopping=True),
    _watchdog("between reaps", "sweep:Sweeper.forget", is_while_stopping=True),
    _watchdog("keeper leaves", "keeper:_leave", is_while_stopping=True),
    _watchdog("keeper is reaped", "loop:Loop._keeper_ended", targets=_NO_KEEPER, most="once", is_while_stopping=True),
    _client("close begins", "harness.link:Link._close", targets=_NO_KEEPER, most="once", is_while_stopping=True),
    _watchdog("watchdog leaves", "loop:Loop._leave", targets=_NO_KEEPER, most="once", is_while_stopping=True),
)
STEPS = {step.name: step for step in _STEPS}
