"""The rules of a test that hangs, and of a server's own deadline, event by event."""

from __future__ import annotations

import pytest
from rules.driven_supervisor import CRASH_GRACE_S, DrivenSupervisor, begin_of, launch_of

from harness.messages import Adopt, Done, EndTest, HoldTest, InterruptSeen, Overdue
from harness.watchdog import events
from harness.watchdog.hangs import ANSWER_S, LOOK_AGAIN_S

DEADLINE_S, GRACE_S = 10.0, 8.0
PASSED = "its deadline of 10 s has passed"


def hanging() -> tuple[DrivenSupervisor, int, int]:
    """Give a supervisor whose test has just been interrupted, with a server of another test, and its own."""
    driven = DrivenSupervisor()
    shared = driven.running("shared", grace_s=2.0)
    driven.request(begin_of(DEADLINE_S, GRACE_S))
    own = driven.running("own", grace_s=15.0)
    driven.tick(DEADLINE_S)
    return driven, shared, own


def due(driven: DrivenSupervisor) -> list[events.Effect]:
    """Let time pass until the next deadline."""
    assert driven.deadline_s is not None
    driven.tick(driven.deadline_s)
    return driven.latest_acts


def answer(driven: DrivenSupervisor, *, is_debugging: bool = False) -> str:
    reply = driven.reply(driven.request(InterruptSeen(is_debugging)))
    assert isinstance(reply, Overdue)
    return reply.reason


def test_each_step_has_its_time() -> None:
    driven, shared, own = hanging()
    assert driven.latest_acts == [events.InterruptClient(begin_of(DEADLINE_S, GRACE_S))]
    assert driven.deadline_s == DEADLINE_S + ANSWER_S
    assert due(driven) == [events.Ask([own])]
    assert driven.status(own).reason == f"test_a hangs: {PASSED}"
    driven.tell(events.RootExited(own, -15))
    driven.tell(events.TreeGone(own))
    assert driven.deadline_s == DEADLINE_S + GRACE_S / 2
    assert due(driven) == [events.Ask([shared]), events.InterruptClient(begin_of(DEADLINE_S, GRACE_S))]
    driven.tell(events.TreeGone(shared))
    assert driven.deadline_s == DEADLINE_S + GRACE_S
    (end,) = due(driven)
    assert end == events.EndClient(
        begin_of(DEADLINE_S, GRACE_S), f"test_a: {PASSED}, and it still runs 8 s later: its process is ended"
    )
    assert driven.deadline_s is None


def test_servers_of_a_hung_test_have_the_grace_of_a_crash() -> None:
    driven, _, own = hanging()
    answer(driven)
    driven.tick(DEADLINE_S)
    assert driven.phase(own) == "asked"
    assert driven.tick(DEADLINE_S + GRACE_S / 2)[0] == events.Ask([1])
    driven.tell(events.TreeGone(1))
    assert driven.deadline_s == DEADLINE_S + CRASH_GRACE_S
    assert due(driven) == [events.Kill([own])]


def test_an_answer_says_why_and_its_servers_are_stopped_at_once() -> None:
    driven, _, own = hanging()
    driven.at(DEADLINE_S + 0.125)
    assert answer(driven) == PASSED
    assert due(driven) == [events.Ask([own])]
    assert driven.now == 1000.0 + DEADLINE_S + 0.125
    driven.tell(events.TreeGone(own))
    assert driven.deadline_s == DEADLINE_S + GRACE_S / 2


def test_an_answer_that_comes_while_a_debugger_holds_the_test_begins_all_again() -> None:
    driven, _, _ = hanging()
    driven.request(HoldTest(is_held=True))
    assert answer(driven) == ""
    assert driven.deadline_s is None
    driven.at(60.0).request(HoldTest(is_held=False))
    assert driven.deadline_s == 60.0 + LOOK_AGAIN_S
    assert due(driven) == [events.InterruptClient(begin_of(DEADLINE_S, GRACE_S))]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_debugger_that_comes_late_saves_the_process(steps: int) -> None:
    """It was attached after the servers were stopped: what is due then is put off, and begins with an interrupt."""
    driven, shared, own = hanging()
    for key in (own, shared)[:steps]:
        assert events.Ask([key]) in due(driven)
        driven.tell(events.TreeGone(key))
    assert driven.deadline_s is not None
    driven.at(driven.deadline_s)
    assert driven.rules.hang_is_due(driven.now)
    driven.tell(events.DebuggerSeen())
    assert not driven.rules.hang_is_due(driven.now)
    assert due(driven) == [events.InterruptClient(begin_of(DEADLINE_S, GRACE_S))]
    assert driven.made(events.EndClient) == []


def test_a_debugger_that_answers_late_saves_the_process() -> None:
    driven, _, own = hanging()
    due(driven)
    driven.tell(events.TreeGone(own))
    assert answer(driven, is_debugging=True) == ""
    assert due(driven) == [events.InterruptClient(begin_of(DEADLINE_S, GRACE_S))]


def test_a_process_that_was_ended_is_not_saved_any_more() -> None:
    driven, shared, own = hanging()
    for _ in range(3):
        due(driven)
        for key in (own, shared):
            driven.tell(events.TreeGone(key))
    driven.tell(events.DebuggerSeen())
    assert driven.deadline_s is None


def test_an_answer_that_comes_after_the_servers_were_stopped_still_says_why() -> None:
    driven, _, own = hanging()
    assert due(driven) == [events.Ask([own])]
    later = driven.deadline_s
    assert answer(driven) == PASSED
    assert driven.deadline_s == later


def test_a_test_that_ends_in_time_is_left_alone() -> None:
    driven = DrivenSupervisor()
    driven.request(begin_of())
    assert driven.reply(driven.request(EndTest())) == Done()
    assert driven.deadline_s is None
    assert answer(driven) == ""


@pytest.mark.parametrize("steps", range(4))
def test_a_test_that_ends_late_is_followed_by_nothing_more(steps: int) -> None:
    driven, _, own = hanging()
    for _ in range(steps):
        due(driven)
        driven.tell(events.TreeGone(own))
    driven.request(EndTest())
    driven.request(begin_of(None))
    for key in (1, own):
        driven.tell(events.TreeGone(key))
    assert driven.deadline_s is None


def test_the_next_test_has_its_own_servers_and_time() -> None:
    driven, _, first = hanging()
    driven.request(EndTest())
    driven.at(20.0).request(begin_of(1.0))
    second = driven.running("second")
    driven.tick(21.0)
    assert answer(driven) == "its deadline of 1 s has passed"
    assert due(driven) == [events.Ask([second])]
    assert driven.phase(first) == "running"


def test_a_test_that_begins_ends_the_one_before_it() -> None:
    driven, _, _ = hanging()
    driven.request(begin_of(None))
    assert driven.deadline_s is None


# ---- debuggers


@pytest.mark.parametrize("is_answer", [True, False])
def test_a_debugger_takes_the_interrupt_back_and_is_looked_for_again(*, is_answer: bool) -> None:
    driven, _, own = hanging()
    if is_answer:
        assert answer(driven, is_debugging=True) == ""
    else:
        driven.tell(events.DebuggerSeen())
    assert driven.deadline_s == DEADLINE_S + LOOK_AGAIN_S
    assert due(driven) == [events.InterruptClient(begin_of(DEADLINE_S, GRACE_S))]
    assert answer(driven) == PASSED
    assert due(driven) == [events.Ask([own])]


def test_a_debugger_that_comes_when_nobody_has_looked_changes_nothing() -> None:
    driven = DrivenSupervisor()
    driven.request(begin_of())
    driven.tell(events.DebuggerSeen())
    assert driven.deadline_s == DEADLINE_S


def test_no_time_passes_while_pytest_says_that_a_debugger_is_at_work() -> None:
    driven = DrivenSupervisor()
    driven.request(begin_of())
    driven.at(4.0).request(HoldTest(is_held=True))
    driven.at(5.0).request(HoldTest(is_held=True))
    assert driven.deadline_s is None
    driven.at(100.0).request(HoldTest(is_held=False))
    assert driven.deadline_s == 106.0
    driven.request(HoldTest(is_held=False))
    assert driven.deadline_s == 106.0


def test_a_debugger_holds_a_test_without_a_deadline() -> None:
    driven = DrivenSupervisor()
    driven.request(begin_of(None))
    driven.request(HoldTest(is_held=True))
    driven.request(HoldTest(is_held=False))
    assert driven.deadline_s is None


def test_a_post_mortem_debugger_holds_the_end_of_the_process() -> None:
    driven, _, own = hanging()
    answer(driven)
    due(driven)
    driven.tell(events.TreeGone(own))
    driven.tell(events.TreeGone(1))
    driven.at(12.0).request(HoldTest(is_held=True))
    assert driven.deadline_s is None
    driven.at(1000.0).request(HoldTest(is_held=False))
    assert driven.deadline_s == 1000.0 + DEADLINE_S + GRACE_S / 2 - 12.0


def test_a_test_that_ends_in_a_debugger_frees_the_next_one() -> None:
    driven = DrivenSupervisor()
    driven.request(begin_of())
    driven.request(HoldTest(is_held=True))
    driven.request(EndTest())
    driven.request(begin_of())
    assert driven.deadline_s == DEADLINE_S


# ---- a server's own deadline


def test_a_server_is_stopped_at_its_deadline_whatever_the_test_process_does() -> None:
    driven = DrivenSupervisor()
    key = driven.request(launch_of(grace_s=2.0, deadline_s=3.0))
    driven.tell(events.Started(key, 101, 7, 201, {}))
    assert driven.deadline_s == 3.0
    assert due(driven) == [events.Ask([key])]
    assert driven.deadline_s == 5.0
    driven.tell(events.RootExited(key, -15))
    driven.tell(events.TreeGone(key))
    assert driven.status(key).reason == "its deadline of 3 s has passed"
    assert driven.stopped(driven.stop(key)).outcomes[0].reason == "its deadline of 3 s has passed"


def test_a_server_that_never_came_up_is_stopped_at_its_deadline() -> None:
    driven = DrivenSupervisor()
    key = driven.request(launch_of(deadline_s=3.0))
    assert due(driven) == [events.Ask([key])]


@pytest.mark.parametrize("stop_first", [True, False])
def test_a_deadline_of_a_server_that_is_over_or_stopping_changes_nothing(*, stop_first: bool) -> None:
    driven = DrivenSupervisor()
    key = driven.request(launch_of(grace_s=2.0, deadline_s=3.0))
    driven.tell(events.Started(key, 101, 7, 201, {}))
    if stop_first:
        driven.at(2.0).stop(key)
    else:
        driven.tell(events.TreeGone(key))
    assert driven.deadline_s == (4.0 if stop_first else None)
    assert driven.tick(3.0) == []
    assert driven.status(key).reason == ""


def own_server_is_overdue(*requests: object) -> DrivenSupervisor:
    driven = DrivenSupervisor()
    driven.request(begin_of(None))
    key = driven.request(launch_of(deadline_s=3.0))
    driven.tell(events.Started(key, 101, 7, 201, {}))
    for request in requests:
        driven.request(request)  # type: ignore[arg-type]  # each is a request
    driven.tick(3.0)
    return driven


def test_a_test_that_outlives_its_servers_deadline_is_taken_for_hung() -> None:
    driven = own_server_is_overdue()
    assert driven.latest_acts == [events.Ask([1]), events.InterruptClient(begin_of(None))]
    assert answer(driven) == "'a' was stopped, since its deadline of 3 s has passed"


def test_a_server_of_an_earlier_test_does_not_make_this_one_hang() -> None:
    driven = own_server_is_overdue(EndTest(), begin_of())
    assert driven.latest_acts == [events.Ask([1])]
    driven = own_server_is_overdue(EndTest())
    assert driven.latest_acts == [events.Ask([1])]


def test_a_held_test_is_interrupted_only_after_the_debugger() -> None:
    driven = own_server_is_overdue(HoldTest(is_held=True))
    assert driven.latest_acts == [events.Ask([1])]
    driven.tell(events.TreeGone(1))
    assert driven.deadline_s is None
    driven.at(60.0).request(HoldTest(is_held=False))
    assert due(driven) == [events.InterruptClient(begin_of(None))]


def test_two_servers_deadlines_hang_a_test_once() -> None:
    driven = DrivenSupervisor()
    driven.request(begin_of(None))
    for name, deadline_s in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        driven.request(launch_of(name, deadline_s=deadline_s))
    driven.tick(1.0)
    assert len(driven.made(events.InterruptClient)) == 1
    assert answer(driven).startswith("'a' was stopped")
    driven.tick(2.0)
    assert len(driven.made(events.InterruptClient)) == 1


def test_an_adopted_server_belongs_to_the_test_that_adopts_it() -> None:
    driven = DrivenSupervisor()
    driven.request(begin_of())
    key = driven.request(Adopt("b", 50, 7, 2.0))
    driven.tell(events.Started(key, 50, 7, 0, {}))
    driven.tick(DEADLINE_S)
    answer(driven)
    assert due(driven) == [events.Ask([key])]


def test_nothing_more_is_done_for_a_test_whose_process_has_ended() -> None:
    driven, shared, own = hanging()
    driven.tell(events.ClientGone("it has ended"))
    for key in (shared, own):
        driven.tell(events.TreeGone(key))
    assert driven.made(events.Leave)
    assert driven.deadline_s is None
