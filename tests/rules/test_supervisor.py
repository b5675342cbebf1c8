"""The supervisor's promises, one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from rules.driven_supervisor import CRASH_GRACE_S, START, DrivenSupervisor, launch_of
from rules.grids import cells

from harness.messages import (
    Adopt,
    Close,
    Failed,
    Launched,
    Outcome,
    Request,
    SendSignal,
    ServerStatus,
    Status,
    Stop,
    Survivor,
    Wait,
)
from harness.watchdog import events
from harness.watchdog.pending import MOST_UNANSWERED
from harness.watchdog.phases import Phase
from harness.watchdog.supervisor import (
    KEEPER_ANSWER_S,
    KILL_LIMIT_S,
    LAUNCH_LIMIT_S,
    LOST_GRACE_S,
)

if TYPE_CHECKING:
    from collections.abc import Callable

STUCK = Survivor(101, "D", "nfs_wait", "program")
ADOPTION = Adopt("b", 50, 7, 15.0)

Driven = DrivenSupervisor


def launching(driven: Driven) -> None:
    driven.launching()


def running(driven: Driven) -> None:
    driven.running()


def detached(driven: Driven) -> None:
    driven.tell(events.RootExited(driven.running(), 0))


def asked(driven: Driven) -> None:
    driven.stop(driven.running())


def killed(driven: Driven) -> None:
    driven.stop(driven.running(), kill=True)


def lost(driven: Driven) -> None:
    driven.tell(events.KeeperLost(driven.running()))


def unkillable(driven: Driven) -> None:
    driven.stuck(driven.running(), STUCK)


def gone(driven: Driven) -> None:
    detached(driven)
    driven.tell(events.TreeGone(1))


INTO: dict[str, Callable[[Driven], None]] = {
    into.__name__.upper(): into for into in (launching, running, detached, asked, killed, lost, unkillable, gone)
}

EVENTS: dict[str, events.Event] = {
    "Started": events.Started(1, 101, 7, 201, {}),
    "LaunchFailed": events.LaunchFailed(1, "no such program"),
    "RootExited": events.RootExited(1, 3),
    "TreeGone": events.TreeGone(1),
    "KillSeen": events.KillSeen(1),
    "TreeStuck": events.TreeStuck(1, [STUCK]),
    "KeeperLost": events.KeeperLost(1),
    "OrphansGone": events.OrphansGone(),
    "OrphansStuck": events.OrphansStuck([STUCK]),
    "ClientGone": events.ClientGone("test"),
    "Tick": events.Tick(),
}
REQUESTS: dict[str, Request] = {
    "Stop": Stop([1], None, kill=False),
    "Kill": Stop([1], None, kill=True),
    "Close": Close(),
    "Signal": SendSignal(1, 10),
    "Wait": Wait(1, "gone", 1e6),
    "Status": Status(1),
    "Launch": launch_of("b"),
    "Adopt": ADOPTION,
}

# What follows: the phase (a dot: the same), and after a slash the effects other than replies and lines in the log.
AFTER_EVENT = """
            Started  LaunchFailed  RootExited  TreeGone      KillSeen  TreeStuck
LAUNCHING   RUNNING  GONE/Release  .           GONE/Release  .         .
RUNNING     .        .             DETACHED    GONE/Release  .         .
DETACHED    .        .             .           GONE/Release  .         .
ASKED       .        GONE/Release  .           GONE/Release  .         .
KILLED      .        GONE/Release  .           GONE/Release  .         UNKILLABLE
LOST        .        .             .           GONE/Release  .         UNKILLABLE
UNKILLABLE  .        GONE/Release  .           GONE/Release  .         .
GONE        .        .             .           .             .         .
"""
AFTER_MORE_EVENTS = """
            KeeperLost          OrphansGone   OrphansStuck  ClientGone  Tick
LAUNCHING   LOST/SweepOrphans   .             .             ASKED/Ask   KILLED/Kill
RUNNING     LOST/SweepOrphans   .             .             ASKED/Ask   .
DETACHED    LOST/SweepOrphans   .             .             ASKED/Ask   .
ASKED       LOST/SweepOrphans   .             .             .           KILLED/Kill
KILLED      LOST/SweepOrphans   .             .             .           ./KillKeeper
LOST        .                   GONE/Release  UNKILLABLE    .           ./SweepOrphans
UNKILLABLE  LOST/SweepOrphans   .             .             ./Leave     .
GONE        .                   .             .             ./Leave     .
"""
AFTER_REQUEST = """
            Stop       Kill            Close      Signal    Wait  Status  Launch   Adopt
LAUNCHING   ASKED/Ask  KILLED/Kill     ASKED/Ask  .         .     .       ./Spawn  ./Take
RUNNING     ASKED/Ask  KILLED/Kill     ASKED/Ask  ./Signal  .     .       ./Spawn  ./Take
DETACHED    ASKED/Ask  KILLED/Kill     ASKED/Ask  .         .     .       ./Spawn  ./Take
ASKED       .          KILLED/Kill     .          ./Signal  .     .       ./Spawn  ./Take
KILLED      .          .               .          ./Signal  .     .       ./Spawn  ./Take
LOST        .          ./SweepOrphans  .          ./Signal  .     .       ./Spawn  ./Take
UNKILLABLE  .          .               ./Leave    ./Signal  .     .       ./Spawn  ./Take
GONE        .          .               ./Leave    .         .     .       ./Spawn  ./Take
"""
PAIRS = cells(AFTER_EVENT) + cells(AFTER_MORE_EVENTS) + cells(AFTER_REQUEST)


def test_every_phase_and_event_is_expected() -> None:
    expected = {(phase, event) for phase, event, _ in PAIRS}
    assert expected == {(phase.name, event) for phase in Phase for event in (*EVENTS, *REQUESTS)}


@pytest.mark.parametrize(("phase", "event", "follows"), PAIRS)
def test_each_event_in_each_phase(phase: str, event: str, follows: str) -> None:
    """The phase and the effects are as expected, and every request gets one reply by the time that all is over."""
    driven = Driven()
    INTO[phase](driven)
    assert driven.phase() == phase.lower()
    if event in REQUESTS:
        driven.request(REQUESTS[event])
    else:
        driven.at(20.0).tell(EVENTS[event])
    next_phase, _, effects = follows.partition("/")
    assert [type(effect).__name__ for effect in driven.latest_acts] == effects.split()
    assert driven.phase() == (phase if next_phase == "." else next_phase).lower()
    driven.tell(events.OrphansGone())
    for key in (1, 2) if event in {"Launch", "Adopt"} else (1,):
        driven.tell(events.TreeGone(key))
    assert driven.deadline_s is None
    assert {request_id: len(replies) for request_id, replies in driven.replies.items() if len(replies) != 1} == {}


# ---- launching


@pytest.mark.parametrize(
    ("request_", "effect"),
    [(launch_of(), events.Spawn(1, launch_of())), (ADOPTION, events.Take(1, ADOPTION))],
)
def test_a_launch_or_adoption_is_answered_when_its_root_has_started(request_: Request, effect: events.Effect) -> None:
    driven = Driven()
    request_id = driven.request(request_)
    assert driven.latest == [effect]
    driven.tell(events.Started(1, 101, 7, 201, {"": 8000}))
    assert driven.reply(request_id) == Launched(1, 101, 7, 201, {"": 8000})


@pytest.mark.parametrize("event", [events.TreeGone(1), events.KeeperLost(1)])
def test_a_tree_or_keeper_that_ends_while_launching_fails_the_launch(event: events.Event) -> None:
    driven = Driven()
    driven.launching("rank0")
    driven.tell(event)
    reply = driven.reply(1)
    assert isinstance(reply, Failed)
    assert (reply.error, "'rank0'" in reply.message) == ("LaunchFailed", True)


def test_a_launch_that_hangs_fails_and_its_keeper_is_ended() -> None:
    """A stopped keeper, or a program on a file system that does not answer."""
    driven = Driven()
    key = driven.launching()
    assert driven.tick(LAUNCH_LIMIT_S - 0.1) == []
    driven.tick(LAUNCH_LIMIT_S)
    assert driven.latest_acts == [events.Kill([key])]
    assert driven.reply(key) == Failed("LaunchFailed", "'a' was not started within 10 s")
    driven.tick(LAUNCH_LIMIT_S + KEEPER_ANSWER_S)
    assert driven.latest_acts == [events.KillKeeper(key)]
    driven.tell(events.KeeperLost(key))
    assert driven.latest_acts == [events.SweepOrphans(kill=True)]
    driven.tell(events.OrphansGone())
    assert driven.phase(key) == "gone"


def test_a_launch_that_was_in_time_leaves_no_deadline() -> None:
    driven = Driven()
    driven.running()
    assert driven.deadline_s is None
    assert driven.tick(LAUNCH_LIMIT_S) == []


def test_a_server_that_is_asked_while_launching_has_its_whole_grace() -> None:
    driven = Driven()
    key = driven.launching(grace_s=20.0)
    driven.at(9.0)
    driven.stop(key)
    assert driven.deadline_s == 29.0


def test_keys_are_never_used_twice() -> None:
    driven = Driven()
    driven.tell(events.TreeGone(driven.running()))
    assert driven.running() == 2


@pytest.mark.parametrize("request_", [launch_of("b"), ADOPTION])
def test_the_key_of_a_server_that_is_there_is_refused(request_: Request) -> None:
    driven = Driven()
    key = driven.running()
    effects = driven.tell(events.Requested(key, request_))
    assert [type(effect) for effect in effects] == [events.Answer]
    assert isinstance(driven.replies[key][-1], Failed)
    driven.stop(key)
    assert driven.made(events.Ask) == [events.Ask([key])]


def test_a_failed_launch_is_answered_once_and_gives_back_what_was_held() -> None:
    driven = Driven()
    key = driven.launching()
    driven.tell(events.LaunchFailed(key, "no such program"))
    driven.tell(events.TreeGone(key))
    assert driven.reply(1) == Failed("LaunchFailed", "no such program")
    assert driven.made(events.Release) == [events.Release(key)]


@pytest.mark.parametrize("request_", [launch_of(), ADOPTION])
@pytest.mark.parametrize("by", ["close", "client gone"])
def test_nothing_is_started_once_the_watchdog_is_to_end(request_: Request, by: str) -> None:
    driven = Driven()
    driven.running()
    if by == "close":
        driven.request(Close())
    else:
        driven.tell(events.ClientGone("test"))
    request_id = driven.request(request_)
    assert isinstance(driven.reply(request_id), Failed)
    assert driven.latest_acts == []


def test_a_stop_while_launching_asks_and_both_requests_are_answered() -> None:
    driven = Driven()
    key = driven.launching()
    stop = driven.stop(key)
    assert driven.latest == [events.Ask([key])]
    driven.tell(events.Started(key, 101, 7, 201, {}))
    assert driven.phase(key) == "asked"
    driven.tell(events.RootExited(key, -15))
    driven.at(2.0).tell(events.TreeGone(key))
    assert isinstance(driven.reply(1), Launched)
    assert driven.stopped(stop).outcomes == [Outcome(key, "a", 101, "asked", -15, 2.0, [], "", [], START)]


@pytest.mark.parametrize("kill", [False, True])
def test_a_launch_that_fails_while_it_is_stopped_ends_the_stop(*, kill: bool) -> None:
    driven = Driven()
    key = driven.launching()
    stop = driven.stop(key, kill=kill)
    driven.tell(events.LaunchFailed(key, "no such program"))
    assert driven.reply(1) == Failed("LaunchFailed", "no such program")
    assert driven.stopped(stop).outcomes[0].how == ("killed" if kill else "asked")


# ---- stopping


def test_a_stop_asks_all_at_once_and_kills_each_at_its_own_grace() -> None:
    driven = Driven()
    a, b, c = driven.running("a", 1.0), driven.running("b", 2.0), driven.running("c", 2.0)
    stop = driven.stop(a, b, c)
    assert driven.latest == [events.Ask([a, b, c])]
    assert driven.deadline_s == 1.0
    assert driven.tick(1.0) == [events.Kill([a])]
    driven.tell(events.KillSeen(a))
    assert driven.deadline_s == 2.0
    assert driven.tick(2.0) == [events.Kill([b, c])]
    for key in (a, b, c):
        driven.at(2.5).tell(events.TreeGone(key))
    stopped = driven.stopped(stop)
    assert [(outcome.how, outcome.seconds) for outcome in stopped.outcomes] == [("killed", 2.5)] * 3
    assert stopped.seconds == 2.5
    assert driven.deadline_s is None


def test_the_grace_of_a_stop_goes_before_the_servers_own() -> None:
    driven = Driven()
    driven.stop(driven.running(grace_s=2.0), grace_s=30.0)
    assert driven.deadline_s == 30.0


@pytest.mark.parametrize(("second_grace_s", "deadline_s"), [(1.0, 4.0), (30.0, 15.0), (None, 15.0)])
def test_a_second_stop_joins_and_can_only_shorten(second_grace_s: float | None, deadline_s: float) -> None:
    driven = Driven()
    key = driven.running()
    first = driven.stop(key)
    second = driven.at(3.0).stop(key, grace_s=second_grace_s)
    assert driven.latest == []
    assert driven.deadline_s == deadline_s
    driven.at(3.5).tell(events.TreeGone(key))
    assert driven.stopped(first).outcomes == driven.stopped(second).outcomes
    assert (driven.stopped(first).seconds, driven.stopped(second).seconds) == (3.5, 0.5)


def test_a_stop_asks_only_those_that_still_run() -> None:
    driven = Driven()
    a, b, c = driven.running(), driven.running(), driven.running()
    driven.tell(events.TreeGone(a))
    driven.stop(b)
    stop = driven.stop(c, b, a, c, a)
    assert driven.latest == [events.Ask([c])]
    for key in (b, c):
        driven.tell(events.TreeGone(key))
    assert [outcome.key for outcome in driven.stopped(stop).outcomes] == [c, b, a]


def test_a_stop_of_nothing_is_answered_at_once() -> None:
    driven = Driven()
    assert driven.stopped(driven.stop()).outcomes == []


def test_a_kill_during_the_grace_kills_at_once() -> None:
    driven = Driven()
    key = driven.running()
    first = driven.stop(key)
    driven.at(1.0).stop(key, kill=True)
    assert driven.latest == [events.Kill([key])]
    driven.stop(key, kill=True)
    assert driven.latest == []
    driven.at(1.5).tell(events.TreeGone(key))
    assert list(driven.stopped(first).outcomes[0])[3:6] == ["killed", None, 1.5]


def test_a_kill_without_an_ask_is_timed_from_the_order() -> None:
    driven = Driven()
    kill = driven.at(1.0).stop(driven.running(), kill=True)
    driven.at(1.5).tell(events.TreeGone(1))
    assert list(driven.stopped(kill).outcomes[0])[3:6] == ["killed", None, 0.5]


def test_a_server_that_ends_before_its_deadline_is_not_killed() -> None:
    driven = Driven()
    key = driven.running(grace_s=1.0)
    stop = driven.stop(key)
    driven.tell(events.RootExited(key, 0))
    driven.at(0.75).tell(events.TreeGone(key))
    assert driven.tick(1.0) == []
    assert driven.stopped(stop).outcomes == [Outcome(key, "a", 101, "asked", 0, 0.75, [], "", [], START)]


def test_what_outlives_its_root_is_asked_and_killed_like_a_root() -> None:
    driven = Driven()
    key = driven.running(grace_s=1.0)
    driven.tell(events.RootExited(key, 0))
    assert driven.status(key) == ServerStatus(
        key, "detached", root_exited=True, returncode=0, exited_at=START, reason=""
    )
    driven.stop(key)
    assert driven.latest == [events.Ask([key])]
    assert driven.tick(1.0) == [events.Kill([key])]


def test_a_server_that_ended_by_itself_is_reported_as_exited() -> None:
    driven = Driven()
    key = driven.running()
    driven.tell(events.RootExited(key, 3))
    driven.at(1.0).tell(events.TreeGone(key))
    assert driven.stopped(driven.stop(key)).outcomes == [Outcome(key, "a", 101, "exited", 3, 0.0, [], "", [], START)]


def test_what_was_held_is_given_back_exactly_once() -> None:
    driven = Driven()
    key = driven.running()
    driven.stop(key, kill=True)
    for event in (events.TreeGone(key), events.TreeGone(key), events.OrphansGone(), events.KeeperLost(key)):
        driven.tell(event)
    assert driven.made(events.Release) == [events.Release(key)]


# ---- the end


def test_close_stops_everything_and_replies_before_leaving() -> None:
    driven = Driven()
    a, b = driven.running("a"), driven.running("b")
    close = driven.request(Close())
    assert driven.latest == [events.Ask([a, b])]
    driven.tell(events.TreeGone(a))
    driven.at(1.0).tell(events.TreeGone(b))
    assert driven.latest[-2:] == [events.Answer(close, driven.stopped(close)), events.Leave()]
    assert [outcome.name for outcome in driven.stopped(close).outcomes] == ["a", "b"]


def test_a_client_that_goes_leaves_each_server_no_more_than_the_crash_grace() -> None:
    driven = Driven()
    a, b, c = driven.running("a", 2.0), driven.running("b"), driven.launching("c")
    driven.tell(events.ClientGone("test"))
    assert driven.latest[1:] == [events.Ask([a, b, c])]
    assert driven.tick(2.0) == [events.Kill([a])]
    driven.tell(events.KillSeen(a))
    assert driven.tick(CRASH_GRACE_S) == [events.Kill([b, c])]
    for key in (a, b):
        assert events.Leave() not in driven.tell(events.TreeGone(key))
    assert driven.tell(events.TreeGone(c))[-1] == events.Leave()


def test_a_client_that_goes_during_a_stop_shortens_the_grace_to_the_crash_grace() -> None:
    driven = Driven()
    key = driven.running(grace_s=60.0)
    driven.stop(key)
    driven.at(1.0).tell(events.ClientGone("test"))
    assert driven.latest_acts == []
    assert driven.tick(1.0 + CRASH_GRACE_S) == [events.Kill([key])]


def test_a_client_that_goes_does_not_lengthen_a_grace() -> None:
    driven = Driven()
    driven.stop(driven.running(grace_s=2.0))
    driven.at(1.0).tell(events.ClientGone("test"))
    assert driven.deadline_s == 2.0


def test_a_stop_after_the_client_has_gone_does_not_lengthen_the_grace() -> None:
    driven = Driven()
    key = driven.running()
    driven.tell(events.ClientGone("test"))
    driven.at(1.0).stop(key, grace_s=60.0)
    assert driven.deadline_s == CRASH_GRACE_S


def test_a_second_sign_that_the_client_has_gone_changes_nothing() -> None:
    driven = Driven()
    driven.running()
    driven.tell(events.ClientGone("the Pipe"))
    assert driven.at(1.0).tell(events.ClientGone("the pidfd")) == []
    assert driven.deadline_s == CRASH_GRACE_S


# ---- keepers


@pytest.mark.parametrize("phase", ["LAUNCHING", "RUNNING", "DETACHED", "ASKED", "KILLED", "UNKILLABLE"])
def test_what_a_lost_keeper_left_is_swept(phase: str) -> None:
    """It is asked, unless it was being killed, and then killed after a short grace."""
    driven = Driven()
    INTO[phase](driven)
    driven.tell(events.KeeperLost(1))
    was_killed = phase in {"KILLED", "UNKILLABLE"}
    assert driven.latest_acts == [events.SweepOrphans(kill=was_killed)]
    assert driven.deadline_s == (0.0 if was_killed else LOST_GRACE_S)
    assert driven.tick(LOST_GRACE_S) == [events.SweepOrphans(kill=True)]
    stop = driven.stop(1)
    driven.at(6.0).tell(events.OrphansGone())
    assert driven.stopped(stop).outcomes[0].how == "killed"
    assert driven.stopped(stop).outcomes[0].seconds == (0.0 if phase == "UNKILLABLE" else 6.0)
    assert all(len(replies) == 1 for replies in driven.replies.values())


def test_the_orphans_of_a_short_grace_are_killed_after_it() -> None:
    driven = Driven()
    driven.tell(events.KeeperLost(driven.running(grace_s=1.0)))
    assert driven.tick(1.0) == [events.SweepOrphans(kill=True)]


def test_orphans_that_cannot_be_killed_end_the_stop_of_every_lost_server() -> None:
    driven = Driven()
    a, b, c = driven.running("a"), driven.running("b"), driven.running("c")
    for key in (a, b):
        driven.tell(events.KeeperLost(key))
    stop = driven.stop(a, b)
    driven.tell(events.OrphansStuck([STUCK]))
    assert [(o.how, o.survivors) for o in driven.stopped(stop).outcomes] == [("unkillable", [STUCK])] * 2
    assert driven.phase(c) == "running"


def test_orphans_that_end_after_they_were_given_up_are_gone() -> None:
    driven = Driven()
    key = driven.running()
    driven.tell(events.KeeperLost(key))
    driven.tell(events.OrphansStuck([STUCK]))
    driven.tell(events.OrphansGone())
    assert driven.phase(key) == "gone"
    assert driven.made(events.Release) == [events.Release(key)]


def test_a_lost_keeper_does_not_lengthen_the_grace_of_a_stop() -> None:
    driven = Driven()
    key = driven.running()
    driven.stop(key, grace_s=1.0)
    driven.at(0.5).tell(events.KeeperLost(key))
    assert driven.deadline_s == 1.0


def test_a_keeper_that_not_even_sigkill_ends_does_not_hold_up_the_stop() -> None:
    driven = Driven()
    key = driven.running()
    stop = driven.stop(key, kill=True)
    driven.tick(KEEPER_ANSWER_S)
    driven.tick(KEEPER_ANSWER_S + KILL_LIMIT_S)
    assert driven.stopped(stop).outcomes[0].how == "unkillable"
    assert len(driven.made(events.KillKeeper)) == 1


def test_a_keeper_that_does_not_answer_an_order_to_kill_is_ended() -> None:
    driven = Driven()
    key = driven.running()
    driven.stop(key, kill=True)
    assert driven.deadline_s == KEEPER_ANSWER_S
    assert driven.tick(KEEPER_ANSWER_S)[-1] == events.KillKeeper(key)
    assert driven.deadline_s == KEEPER_ANSWER_S + KILL_LIMIT_S
    driven.tell(events.KeeperLost(key))
    assert driven.latest_acts == [events.SweepOrphans(kill=True)]
    driven.at(2.0).tell(events.OrphansGone())
    assert driven.stopped(driven.stop(key)).outcomes[0].seconds == 2.0


def test_a_keeper_that_answered_has_the_time_to_kill_and_is_ended_after_it() -> None:
    driven = Driven()
    key = driven.running()
    driven.stop(key, kill=True)
    driven.at(0.5).tell(events.KillSeen(key))
    limit_s = 0.5 + KILL_LIMIT_S + KEEPER_ANSWER_S
    assert driven.tick(limit_s - 0.1) == []
    assert driven.tick(limit_s)[-1] == events.KillKeeper(key)


def test_what_cannot_be_killed_ends_the_stop_and_is_watched_on() -> None:
    driven = Driven()
    key = driven.running(grace_s=1.0)
    stop = driven.stop(key)
    driven.tick(1.0)
    driven.tell(events.KillSeen(key))
    driven.at(6.0).tell(events.TreeStuck(key, [STUCK]))
    assert driven.stopped(stop).outcomes == [Outcome(key, "a", 101, "unkillable", None, 6.0, [STUCK], "", [], None)]
    assert driven.deadline_s is None
    driven.at(60.0).tell(events.TreeGone(key))
    assert driven.latest == [events.Release(key)]
    assert driven.stopped(driven.stop(key)).outcomes == [
        Outcome(key, "a", 101, "killed", None, 6.0, [], "", [], START + 60.0)
    ]


# ---- waits, signals, wrong requests


@pytest.mark.parametrize("until", ["exit", "gone"])
def test_a_wait_is_answered_when_what_it_waits_for_has_happened(until: str) -> None:
    driven = Driven()
    key = driven.running()
    wait = driven.request(Wait(key, until, 60.0))
    driven.tell(events.RootExited(key, 3))
    assert bool(driven.replies[wait]) == (until == "exit")
    driven.tell(events.TreeGone(key))
    assert len(driven.replies[driven.request(Wait(key, until, 60.0))]) == 1
    phase = "detached" if until == "exit" else "gone"
    assert driven.reply(wait) == ServerStatus(key, phase, root_exited=True, returncode=3, exited_at=START, reason="")
    assert driven.deadline_s is None


@pytest.mark.parametrize("request_", [Wait(1, "gone", 9.0), Stop([1], None, kill=False)])
def test_a_client_may_leave_only_so_many_requests_unanswered(request_: Request) -> None:
    driven = Driven()
    key = driven.running()
    waits = [driven.request(request_) for _ in range(MOST_UNANSWERED)]
    assert isinstance(driven.reply(driven.request(request_)), Failed)
    for other in (Wait(key, "exit", 0.0), Stop([key], None, kill=True)):  # the one kind does not keep out the other
        if type(other) is not type(request_):
            assert driven.replies[driven.request(other)][:1] in ([], [driven.status(key)])
    close = driven.request(Close())  # the end is never refused
    driven.tell(events.TreeGone(key))
    assert driven.stopped(close)
    assert not [wait for wait in waits if isinstance(driven.reply(wait), Failed)]


@pytest.mark.parametrize("number", [-1, 0, 65, 1 << 40])
def test_what_is_no_signal_is_refused(number: int) -> None:
    driven = Driven()
    request = driven.request(SendSignal(driven.running(), number))
    assert isinstance(driven.reply(request), Failed)
    assert not driven.made(events.Signal)


def test_a_wait_ends_at_its_timeout() -> None:
    driven = Driven()
    key = driven.running()
    wait = driven.request(Wait(key, "gone", 2.0))
    longer = driven.request(Wait(key, "gone", 3.0))
    assert driven.tick(1.9) == []
    driven.tick(2.0)
    assert driven.reply(wait) == ServerStatus(
        key, "running", root_exited=False, returncode=None, exited_at=None, reason=""
    )
    assert driven.replies[longer] == []


def test_no_signal_goes_to_a_server_that_was_never_there() -> None:
    driven = Driven()
    key = driven.launching()
    driven.tell(events.LaunchFailed(key, "no such program"))
    driven.request(SendSignal(key, 10))
    assert driven.latest_acts == []


@pytest.mark.parametrize(
    "request_", [Stop([1, 9], None, kill=False), SendSignal(9, 10), Wait(9, "gone", 1.0), Status(9)]
)
def test_a_request_for_an_unknown_server_fails_and_does_nothing(request_: Request) -> None:
    driven = Driven()
    driven.running()
    reply = driven.reply(driven.request(request_))
    assert isinstance(reply, Failed)
    assert (reply.error, "9" in reply.message) == ("SpecError", True)
    assert driven.latest_acts == []


def test_the_next_deadline_is_the_nearest_of_all() -> None:
    driven = Driven()
    a, b = driven.running("a", 5.0), driven.running("b", 4.0)
    assert driven.deadline_s is None
    driven.request(Wait(a, "gone", 9.0))
    assert driven.deadline_s == 9.0
    driven.stop(a)
    assert driven.deadline_s == 5.0
    driven.stop(b)
    assert driven.deadline_s == 4.0
    driven.tell(events.TreeGone(b))
    assert driven.deadline_s == 5.0
    driven.tell(events.TreeGone(a))
    assert driven.deadline_s is None


# ---- the last replies


def test_every_reply_comes_before_leaving() -> None:
    driven = Driven()
    key = driven.running()
    driven.request(Close())
    driven.stop(key)
    driven.tell(events.TreeGone(key))
    assert driven.latest[-1] == events.Leave()


def test_a_launch_that_hangs_and_cannot_be_killed_is_answered_before_leaving() -> None:
    driven = Driven()
    driven.stuck(driven.launching(), STUCK)
    driven.request(Close())
    assert driven.latest[-1] == events.Leave()
    assert isinstance(driven.reply(1), Failed)
