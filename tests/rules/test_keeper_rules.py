"""The rules of a keeper: every event in every state, and its promises one by one."""

from __future__ import annotations

import pytest
from rules.grids import cells

from harness.messages import AskOrder, KillBegun, KillOrder, RootExit, RootFailed, RootStarted, TreeEmpty
from harness.watchdog import keeper_rules as keeper
from harness.watchdog.keeper_rules import (
    FIRST_PAUSE_S,
    KILL_LIMIT_S,
    LONGEST_PAUSE_S,
    TOP_PAUSE_S,
    KillTop,
    Reaped,
    Sweep,
    Swept,
    Tell,
    Tick,
)

CRASH_GRACE_S = 5.0
EVENTS: dict[str, keeper.Event] = {
    "Ask": keeper.Ordered(AskOrder(root_asked=False)),
    "RootAsked": keeper.Ordered(AskOrder(root_asked=True)),
    "Kill": keeper.Ordered(KillOrder()),
    "Up": keeper.RootUp(101),
    "Down": keeper.RootDown("no such program"),
    "RootReaped": Reaped(3, is_empty=False, is_new=False),
    "Reaped": Reaped(None, is_empty=False, is_new=False),
    "NewTop": Reaped(None, is_empty=False, is_new=True),
    "AllReaped": Reaped(3, is_empty=True, is_new=False),
    "WatchdogGone": keeper.WatchdogGone(),
    "Swept": Swept(is_new=False, alive=1),
    "Tick": Tick(),
}
# A state: the events that lead to it.
STATES: dict[str, list[str]] = {
    "starting": [],
    "asked_early": ["Ask"],
    "killed_early": ["Kill"],
    "up": ["Up"],
    "asked": ["Up", "Ask"],
    "down": ["Down"],
    "left": ["Up", "RootReaped"],
    "asked_left": ["Up", "RootReaped", "Ask"],
    "killing": ["Up", "Kill"],
    "alone": ["Up", "WatchdogGone"],
}
# KT: it tells that it begins to kill, and kills the top.
# E, F: it tells that all (F: the failed root) is gone, and leaves.
EXPECTED = """
              Ask     RootAsked  Kill  Up           Down  RootReaped   Reaped  NewTop  AllReaped  Swept
starting      -       -          KT    Started      -     Exit         -       -       Exit+E     -
asked_early   -       -          KT    Started+Ask  -     Exit+AskTop  -       -       Exit+E     -
killed_early  -       -          KT    Started      -     Exit         -       Sweep   Exit+E     -
up            Ask     -          KT    Started      -     Exit         -       -       Exit+E     -
asked         -       -          KT    Started      -     Exit+AskTop  -       -       Exit+E     -
down          -       -          KT    Started      -     -            -       -       F          -
left          AskTop  AskTop     KT    Started      -     Exit         -       -       Exit+E     -
asked_left    AskTop  AskTop     KT    Started+AskTop  -  Exit+AskTop  AskTop  AskTop  Exit+E     -
killing       -       -          KT    Started      -     Exit         -       Sweep   Exit+E     -
alone         -       -          KT    Started      -     Exit+AskTop  -       -       Exit+E     -
"""
EXPECTED_ALONE = """
              WatchdogGone  Tick
starting      -             KillTop
asked_early   -             KillTop
killed_early  -             Sweep
up            Ask           KillTop
asked         -             KillTop
down          -             KillTop
left          AskTop        KillTop
asked_left    AskTop        KillTop
killing       -             Sweep
alone         -             KillTop
"""
MEANING: dict[str, list[keeper.Effect]] = {
    "-": [],
    "Ask": [keeper.AskRoot()],
    "AskTop": [keeper.AskTop()],
    "KT": [Tell(KillBegun()), KillTop()],
    "KillTop": [KillTop()],
    "Sweep": [Sweep()],
    "Started": [Tell(RootStarted(101))],
    "Exit": [Tell(RootExit(3))],
    "E": [Tell(TreeEmpty()), keeper.Leave()],
    "F": [Tell(RootFailed("no such program")), keeper.Leave()],
}


def led(*names: str) -> keeper.KeeperRules:
    """Give rules that have been told these events at the time 0."""
    rules = keeper.KeeperRules(crash_grace_s=CRASH_GRACE_S)
    for name in names:
        rules.handle(EVENTS[name], 0.0)
    return rules


PAIRS = cells(EXPECTED) + cells(EXPECTED_ALONE)


def test_every_state_and_event_is_expected() -> None:
    assert {(state, event) for state, event, _ in PAIRS} == {(state, event) for state in STATES for event in EVENTS}


@pytest.mark.parametrize(("state", "event", "expected"), PAIRS)
def test_each_event_in_each_state(state: str, event: str, expected: str) -> None:
    effects = led(*STATES[state]).handle(EVENTS[event], 1.0)
    assert effects == [effect for word in expected.split("+") for effect in MEANING[word]]


def test_an_ask_before_the_root_is_up_is_remembered() -> None:
    rules = led("Ask")
    assert rules.handle(EVENTS["Up"], 0.0) == [Tell(RootStarted(101)), keeper.AskRoot()]


def test_the_root_is_asked_once_whoever_asks() -> None:
    rules = led("Up", "Ask")
    for event in ("Ask", "RootAsked", "WatchdogGone"):
        assert rules.handle(EVENTS[event], 0.0) == []


def test_a_root_that_the_watchdog_asked_is_not_asked_again_but_what_it_leaves_is() -> None:
    rules = led("Up", "RootAsked")
    assert rules.handle(EVENTS["WatchdogGone"], 0.0) == []
    assert rules.handle(EVENTS["RootReaped"], 0.0) == [Tell(RootExit(3)), keeper.AskTop()]
    assert rules.handle(EVENTS["Reaped"], 0.0) == [keeper.AskTop()]


def test_a_failed_start_is_told_once_and_not_as_an_exit() -> None:
    rules = led("Down")
    assert rules.handle(Reaped(127, is_empty=False, is_new=False), 0.0) == []
    assert rules.handle(Reaped(None, is_empty=True, is_new=False), 0.0) == [
        Tell(RootFailed("no such program")),
        keeper.Leave(),
    ]


def test_without_a_watchdog_what_is_left_is_killed_after_the_crash_grace() -> None:
    rules = led("Up")
    rules.handle(keeper.WatchdogGone(), 10.0)
    assert rules.deadline == 10.0 + CRASH_GRACE_S
    assert rules.handle(Tick(), 15.0) == [KillTop()]
    assert rules.handle(EVENTS["NewTop"], 15.0) == [Sweep()]
    assert rules.handle(EVENTS["AllReaped"], 15.1)[-1] == keeper.Leave()


@pytest.mark.parametrize("before", [["Up"], ["Up", "Ask"], ["Ask"], []])
def test_without_an_order_there_is_no_deadline_while_the_watchdog_lives(before: list[str]) -> None:
    assert led(*before).deadline is None


def test_the_end_of_the_watchdog_does_not_delay_the_killing() -> None:
    rules = led("Up", "Kill")
    rules.handle(Swept(is_new=True, alive=1), 0.0)
    assert rules.handle(keeper.WatchdogGone(), 0.0) == []
    assert rules.deadline == FIRST_PAUSE_S


def test_the_pause_between_sweeps_doubles_up_to_a_limit_and_begins_anew() -> None:
    """A process that is new to the sweep makes the next one come soon."""
    rules = led("Up", "Kill")
    pauses: list[float] = []
    for is_new in (True, *[False] * 9, True):
        rules.handle(Swept(is_new=is_new, alive=1), 0.0)
        pauses.append(rules.deadline or 0.0)
        assert rules.handle(Tick(), 0.0) == [Sweep()]
        assert rules.deadline is None
    assert pauses == [*(min(FIRST_PAUSE_S * 2**n, LONGEST_PAUSE_S) for n in range(10)), FIRST_PAUSE_S]


def test_what_outlives_the_first_strike_is_swept_whoever_is_reaped_meanwhile() -> None:
    rules = led("Up", "Kill")
    assert rules.deadline == TOP_PAUSE_S
    rules.handle(EVENTS["Reaped"], 0.01)
    assert rules.deadline == TOP_PAUSE_S
    assert rules.handle(Tick(), TOP_PAUSE_S) == [Sweep()]


def test_what_is_alive_after_the_limit_is_told_once() -> None:
    rules = led("Up")
    rules.handle(EVENTS["Kill"], 10.0)
    told = [
        rules.handle(Swept(is_new=False, alive=alive), 10.0 + after_s)
        for after_s, alive in [(KILL_LIMIT_S - 0.1, 1), (KILL_LIMIT_S, 0), (KILL_LIMIT_S + 0.1, 1), (60.0, 1)]
    ]
    assert told == [[], [], [keeper.TellUnkilled()], []]
    rules.handle(Tick(), 70.0)
    assert rules.handle(Swept(is_new=False, alive=1), 80.0) == []
    assert rules.deadline is not None


def test_a_storm_that_outlasts_the_limit_is_told_and_swept_on_until_nothing_is_left() -> None:
    rules = led("Up", "Kill")
    told: list[keeper.Effect] = []
    for step in range(1, 121):  # ten times a second, each time with new processes
        now = step / 10
        told += rules.handle(Swept(is_new=True, alive=40), now)
        assert rules.deadline == now + FIRST_PAUSE_S
        next_sweep = Reaped(None, is_empty=False, is_new=True) if step % 2 else Tick()
        assert rules.handle(next_sweep, now) == [Sweep()]
    assert told == [keeper.TellUnkilled()]
    assert rules.handle(EVENTS["AllReaped"], 13.0)[-2:] == [Tell(TreeEmpty()), keeper.Leave()]


def test_a_second_order_to_kill_does_not_move_the_limit() -> None:
    rules = led("Up", "Kill")
    rules.handle(EVENTS["Kill"], KILL_LIMIT_S - 1.0)
    assert rules.handle(Swept(is_new=False, alive=1), KILL_LIMIT_S) == [keeper.TellUnkilled()]


def test_a_second_sign_that_the_watchdog_has_gone_does_not_lengthen_the_grace() -> None:
    rules = led("Up", "WatchdogGone")
    rules.handle(keeper.WatchdogGone(), 3.0)
    assert rules.deadline == CRASH_GRACE_S
