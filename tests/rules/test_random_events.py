"""Thousands of random runs: what must hold whatever the order of events."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from rules.driven_supervisor import DrivenSupervisor, begin_of, launch_of
from rules.server_world import ServerWorld

from harness.messages import Adopt, Close, EndTest, HoldTest, InterruptSeen, SendSignal, Status, Stop, Wait
from harness.watchdog import events
from harness.watchdog.supervisor import KEEPER_ANSWER_S, KILL_LIMIT_S

if TYPE_CHECKING:
    from harness.messages import Request
    from harness.watchdog.events import Event

# The longest grace in ServerWorld, and a keeper that hangs just after it has begun to kill.
_LONGEST_END_S = 15.0 + KEEPER_ANSWER_S + KILL_LIMIT_S + KEEPER_ANSWER_S + KILL_LIMIT_S


@pytest.mark.parametrize("block", range(20))
def test_what_can_happen_always_ends_well(block: int) -> None:
    """Every request has exactly one reply when the watchdog leaves, and it leaves although keepers may hang."""
    for seed in range(block * 100, block * 100 + 100):
        world = ServerWorld(random.Random(seed))  # noqa: S311 - no secret
        for _ in range(5 + seed % 60):
            world.step()
            if world.has_left:
                break
        _end(world)
        replies = {request: len(found) for request, found in world.driven.replies.items()}
        assert set(replies.values()) <= {1}, seed
        for tree in world.trees.values():
            assert world.driven.status(tree.key).phase in {"gone", "unkillable"}, seed


def _end(world: ServerWorld) -> None:
    """Close, or end the client; then no keeper says anything more, and only time passes."""
    if not world.has_left and not world.client_is_gone:
        if len(world.trees) % 2:
            world.end_client()
        else:
            world.request(Close())
    began = world.driven.now
    while not world.has_left:
        deadline = world.driven.rules.next_deadline()
        if deadline is not None:
            assert deadline <= began + _LONGEST_END_S
            world.driven.now = max(world.driven.now, deadline)
            world.check_time()
        else:
            world.tell(events.OrphansGone())
            assert world.has_left


@pytest.mark.parametrize("block", range(5))
def test_no_order_of_events_is_too_strange(block: int) -> None:
    """Also what cannot happen raises nothing, answers no request twice, and releases no server twice."""
    for seed in range(block * 100, block * 100 + 100):
        chance = random.Random(-1 - seed)  # noqa: S311 - no secret
        driven = DrivenSupervisor()
        driven.launching()
        for _ in range(40):
            driven.now += chance.choice([0.0, 0.5, 5.0])
            _do_anything(driven, chance)
        for released in Counter(driven.made(events.Release)).values():
            assert released == 1, seed
        for replies in driven.replies.values():
            assert len(replies) <= 1, seed
        asked = Counter(key for ask in driven.made(events.Ask) for key in ask.keys)
        assert set(asked.values()) <= {1}, seed


def _do_anything(driven: DrivenSupervisor, chance: random.Random) -> None:
    key = chance.randint(1, len(driven.made(events.Spawn)) + len(driven.made(events.Take)))
    requests: list[Request] = [
        *(launch_of(), Adopt("b", 50, 7, 2.0), SendSignal(key, 10), Status(key), Close()),
        *(begin_of(0.5), begin_of(None), EndTest(), HoldTest(is_held=True), HoldTest(is_held=False)),
        *(InterruptSeen(is_debugging=True), InterruptSeen(is_debugging=False), launch_of(deadline_s=0.5)),
        *(Stop([key, key], None, kill=False), Stop([key], 0.5, kill=True), Wait(key, "gone", 1.0)),
    ]
    others: list[Event] = [
        *(events.Started(key, 100, 7, 200, {}), events.LaunchFailed(key, "no"), events.RootExited(key, 0)),
        *(events.TreeGone(key), events.KillSeen(key), events.TreeStuck(key, []), events.KeeperLost(key)),
        *(events.OrphansGone(), events.OrphansStuck([]), events.ClientGone("test"), events.Tick()),
        events.DebuggerSeen(),
    ]
    if chance.random() < 0.4:
        driven.request(chance.choice(requests))
        return
    event = chance.choice(others)
    driven.tell(event)
    if isinstance(event, events.Tick):
        deadline = driven.rules.next_deadline()
        assert deadline is None or deadline > driven.now
