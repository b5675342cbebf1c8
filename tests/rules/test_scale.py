"""What many servers cost the rules: looks at servers are counted, since seconds depend on the machine."""

from __future__ import annotations

from heapq import heappop
from typing import TYPE_CHECKING, Any

import pytest
from rules.driven_supervisor import DrivenSupervisor

from harness.messages import Close
from harness.watchdog import deadlines, events, tracked
from harness.watchdog.supervisor import KEEPER_ANSWER_S

if TYPE_CHECKING:
    from collections.abc import Callable

GRACE_S = 2.0


class Looks:
    """How often any attribute of any server has been read."""

    def __init__(self) -> None:
        self.count = 0


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    counted = Looks()

    def read(server: object, name: str) -> Any:
        counted.count += 1
        return object.__getattribute__(server, name)

    monkeypatch.setattr(tracked.Tracked, "__getattribute__", read, raising=False)
    return counted


def _run_all(driven: DrivenSupervisor) -> None:
    for number in range(1, len(driven.made(events.Spawn)) + 1):
        driven.tell(events.RootExited(number, 0))
        driven.rules.next_deadline()
        driven.tell(events.TreeGone(number))
        driven.rules.next_deadline()


def stop_all(driven: DrivenSupervisor, servers: int) -> None:
    """Ask all, kill all after the grace, hear each keeper, and see each tree's end."""
    request = driven.stop(*range(1, servers + 1))
    driven.tick(GRACE_S)
    for key in range(1, servers + 1):
        driven.tell(events.KillSeen(key))
        driven.rules.next_deadline()
    _run_all(driven)
    assert {outcome.how for outcome in driven.stopped(request).outcomes} == {"killed"}


def lose_the_client(driven: DrivenSupervisor, _servers: int) -> None:
    driven.tell(events.ClientGone("test"))
    _run_all(driven)
    assert driven.made(events.Leave)


def close_all(driven: DrivenSupervisor, _servers: int) -> None:
    driven.request(Close())
    _run_all(driven)
    assert driven.made(events.Leave)


def stop_one_by_one(driven: DrivenSupervisor, servers: int) -> None:
    for key in range(1, servers + 1):
        driven.stop(key)
        driven.rules.next_deadline()
        driven.tell(events.TreeGone(key))


def keepers_that_do_not_answer(driven: DrivenSupervisor, servers: int) -> None:
    driven.stop(*range(1, servers + 1), kill=True)
    driven.tick(KEEPER_ANSWER_S)
    for key in range(1, servers + 1):
        driven.tell(events.KeeperLost(key))
        driven.rules.next_deadline()
    driven.tell(events.OrphansGone())
    assert driven.phase(servers) == "gone"


@pytest.mark.parametrize("happens", [stop_all, lose_the_client, close_all, stop_one_by_one, keepers_that_do_not_answer])
def test_ten_times_the_servers_are_ten_times_the_work(
    looks: Looks, happens: Callable[[DrivenSupervisor, int], None]
) -> None:
    counts = []
    for servers in (20, 200):
        driven, before = DrivenSupervisor(), looks.count
        for _ in range(servers):
            driven.running(grace_s=GRACE_S)
            driven.rules.next_deadline()
        happens(driven, servers)
        counts.append(looks.count - before)
    assert counts[1] <= 10 * counts[0]


def test_a_deadline_that_has_been_changed_is_met_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pops: list[object] = []

    def pop(heap: list[tuple[float, int]]) -> tuple[float, int]:
        pops.append(heap[0])
        return heappop(heap)

    monkeypatch.setattr(deadlines, "heappop", pop)
    many = deadlines.Deadlines()
    for key in range(1000):
        many.set(key, 1.0)
        many.set(key, 2.0)
        many.next()
    assert len(many.take(2.0)) == 1000
    assert len(pops) == 2000
