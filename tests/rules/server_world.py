"""A small model of what can happen to servers, for runs of random events.

It takes the supervisor's effects as keepers and the kernel would, and offers only events that can come next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rules.driven_supervisor import DrivenSupervisor, begin_of, launch_of

from harness.messages import (
    Adopt,
    Close,
    EndTest,
    HoldTest,
    InterruptSeen,
    SendSignal,
    Status,
    Stop,
    Survivor,
    Wait,
)
from harness.watchdog import events

if TYPE_CHECKING:
    import random

    from harness.messages import Request
    from harness.watchdog.events import Effect, Event

_MOST_SERVERS = 4


@dataclass
class _Tree:
    key: int
    is_up: bool = False
    root_is_gone: bool = False
    is_empty: bool = False
    has_keeper: bool = True
    asks: int = 0
    kills: int = 0
    is_killing: bool = False
    releases: int = 0


class ServerWorld:
    """Servers and their keepers, a supervisor that owns them, and a clock."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.driven = DrivenSupervisor()
        self.trees: dict[int, _Tree] = {}
        self._orphans_are_killed = False
        self.client_is_gone = False
        self.has_left = False

    def step(self) -> None:
        """Let one thing happen."""
        choice = self._chance.random()
        if choice < 0.35:
            self._pass_time()
        elif choice < 0.6 and not self.client_is_gone:
            self.request(self._random_request())
        elif choice < 0.61:
            self.end_client()
        else:
            self.tell(self._chance.choice([*self.possible(), events.Tick()]))

    def request(self, request: Request) -> None:
        self.driven.request(request)
        self._carry_out(self.driven.latest)

    def end_client(self) -> None:
        """End the test process."""
        self.client_is_gone = True
        self.tell(events.ClientGone("test"))

    def tell(self, event: Event) -> None:
        self._happen(event)
        effects = self.driven.tell(event)
        if isinstance(event, events.Tick):
            deadline = self.driven.rules.next_deadline()
            assert deadline is None or deadline > self.driven.now
        self._carry_out(effects)

    def _pass_time(self) -> None:
        self.driven.now += self._chance.choice([0.0, 0.001, 0.5, 3.0])
        self.check_time()

    def check_time(self) -> None:
        """Tick if a deadline has passed."""
        deadline = self.driven.rules.next_deadline()
        if deadline is not None and deadline <= self.driven.now:
            self.tell(events.Tick())

    def _random_request(self) -> Request:
        key = self._chance.randint(1, len(self.trees) + 1)
        keys = [self._chance.randint(1, max(1, len(self.trees))) for _ in range(self._chance.randint(0, 3))]
        grace_s = self._chance.choice([None, 0.5, 4.0])
        requests: list[Request] = [
            Stop(keys, grace_s, kill=self._chance.random() < 0.2),
            SendSignal(key, 10),
            Wait(key, self._chance.choice(["exit", "gone"]), self._chance.choice([0.0, 1.0, 9.0])),
            Status(key),
            begin_of(self._chance.choice([None, 0.5, 20.0])),
            EndTest(),
            HoldTest(self._chance.random() < 0.5),
            InterruptSeen(self._chance.random() < 0.3),
        ]
        if len(self.trees) < _MOST_SERVERS:
            deadline_s = self._chance.choice([None, 2.0, 9.0])
            requests += [launch_of(grace_s=self._chance.choice([1.0, 15.0]), deadline_s=deadline_s)] * 3
            requests += [Adopt("b", 50, 7, 2.0)] * 3
        elif self._chance.random() < 0.05:
            requests = [Close()]
        return self._chance.choice(requests)

    def possible(self) -> list[Event]:
        """Give every event of a server that can come next."""
        found: list[Event] = []
        for tree in self.trees.values():
            if not tree.is_empty:
                found += self._of_keeper(tree) if tree.has_keeper else []
                found += [events.RootExited(tree.key, 0)] if tree.is_up and not tree.root_is_gone else []
        if any(not tree.has_keeper and not tree.is_empty for tree in self.trees.values()):
            found.append(events.OrphansGone())
            found += [events.OrphansStuck([_survivor(0)])] if self._orphans_are_killed else []
        return found

    def _of_keeper(self, tree: _Tree) -> list[Event]:
        found: list[Event] = [events.KeeperLost(tree.key)] if self._chance.random() < 0.2 else []
        if not tree.is_up:
            failed = events.LaunchFailed(tree.key, "no")
            return [*found, events.Started(tree.key, 100, 7, 200, {}), failed]
        found += [events.TreeGone(tree.key)] if tree.root_is_gone else []
        found += [events.TreeStuck(tree.key, [_survivor(tree.key)])] if tree.is_killing else []
        return [*found, *([events.KillSeen(tree.key)] if tree.kills and not tree.is_killing else [])]

    def _happen(self, event: Event) -> None:
        if isinstance(event, events.OrphansGone):
            for tree in self.trees.values():
                tree.is_empty = tree.is_empty or not tree.has_keeper
        elif isinstance(event, events.Started):
            self.trees[event.key].is_up = True
        elif isinstance(event, events.RootExited):
            self.trees[event.key].root_is_gone = True
        elif isinstance(event, (events.LaunchFailed, events.TreeGone)):
            self.trees[event.key].is_empty = True
        elif isinstance(event, events.KillSeen):
            self.trees[event.key].is_killing = True
        elif isinstance(event, events.KeeperLost):
            self.trees[event.key].has_keeper = False

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, (events.Spawn, events.Take)):
                self.trees[effect.key] = _Tree(effect.key)
            elif isinstance(effect, events.Ask):
                for key in effect.keys:
                    self._living(key).asks += 1
            elif isinstance(effect, events.Kill):
                for key in effect.keys:
                    self._living(key).kills += 1
            elif isinstance(effect, events.Release):
                self.trees[effect.key].releases += 1
            else:
                self._carry_out_more(effect)
        for tree in self.trees.values():
            assert (tree.asks <= 1, tree.kills <= 1, tree.releases <= tree.is_empty) == (True, True, True)

    def _carry_out_more(self, effect: Effect) -> None:
        if isinstance(effect, events.SweepOrphans):
            self._orphans_are_killed = effect.kill
        elif isinstance(effect, events.KillKeeper):
            assert self._living(effect.key).has_keeper
            self.tell(events.KeeperLost(effect.key))
        elif isinstance(effect, events.EndClient):
            self.end_client()
        elif isinstance(effect, events.Leave):
            self.has_left = True

    def _living(self, key: int) -> _Tree:
        tree = self.trees[key]
        assert not tree.releases
        return tree


def _survivor(key: int) -> Survivor:
    return Survivor(100 + key, "D", "nfs_wait", "program")
