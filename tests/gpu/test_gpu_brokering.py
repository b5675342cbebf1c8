"""The watchdog's end of the broker: what it makes of a broker that dies, hangs or is too busy to read."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import processes
import pytest
from rules.test_messages import LEASE

from harness import messages
from harness.lease_messages import EndLeaseOrder, LeaseOrder, LeaseStatus
from harness.watchdog import brokering, events
from harness.watchdog.leases import BROKER_ANSWER_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_SPEAKS = """
import marshal, socket, time
pipe = socket.socket(fileno=3)
pipe.send(marshal.dumps(("LeaseStatus", [9, "granted", "", ["GPU-1"]])))
"""
_IS_BUSY = "import time\ntime.sleep(100)  # until it is killed\n"


class Watched:
    """A Brokering without a loop around it, and what it has told."""

    def __init__(self, boot: Path) -> None:
        self.told: list[events.Event] = []
        self.end = brokering.Brokering(lambda *_: None, lambda *_: None, self.told.append, log=str(boot) + ".log")

    def start(self) -> int:
        self.end.send(LeaseOrder(9, LEASE))
        (pid,) = self.end.pids
        return pid

    def reap(self, pid: int) -> None:
        os.waitpid(pid, 0)
        assert self.end.reaped(pid)


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Watched]]:
    """Give a function that makes one whose broker runs this program."""
    made: list[Watched] = []

    def make(program: str) -> Watched:
        boot = tmp_path / "boot.py"
        boot.write_text(program, encoding="utf-8")
        monkeypatch.setattr(brokering, "_BOOT", str(boot))
        made.append(Watched(boot))
        return made[-1]

    yield make
    for one in made:
        for pid in one.end.pids:
            os.kill(pid, signal.SIGKILL)
            one.reap(pid)


def test_a_broker_that_is_reaped_before_its_end_was_read_is_lost_all_the_same(
    watched: Callable[[str], Watched],
) -> None:
    one = watched(_IS_BUSY)
    pid = one.start()
    os.kill(pid, signal.SIGKILL)
    one.reap(pid)
    assert [type(event) for event in one.told] == [events.BrokerLost]
    assert one.end.pids == frozenset()
    assert not one.end.reaped(pid), "the number may be another's now"
    assert one.start() != pid


def test_what_a_broker_has_said_before_it_died_is_heard(watched: Callable[[str], Watched]) -> None:
    """It dies with its order unread: then the socket gives an error once, before it gives the reports."""
    one = watched(_SPEAKS)
    one.reap(one.start())
    assert one.told[0] == events.BrokerSaid(LeaseStatus(9, "granted", "", ["GPU-1"]))
    assert [type(event) for event in one.told] == [events.BrokerSaid, events.BrokerLost]


def test_a_broker_that_is_busy_is_told_later_and_one_that_is_stopped_is_ended(
    watched: Callable[[str], Watched],
) -> None:
    one = watched(_IS_BUSY)
    pid = one.start()
    (who,) = processes.identities([pid])
    for lease in range(1000):
        one.end.send(EndLeaseOrder(lease))
    assert one.told == []
    assert one.end.deadline is not None, "they are sent again"
    now = one.end._unsent_since
    one.end.see_time(now + BROKER_ANSWER_S - 0.1)
    assert processes.is_running(who)
    one.end.see_time(now + BROKER_ANSWER_S + 0.1)
    one.reap(pid)
    assert [type(event) for event in one.told] == [events.BrokerLost]
    assert one.end.deadline is None


def test_a_second_store_is_refused(watched: Callable[[str], Watched]) -> None:
    one = watched(_IS_BUSY)
    one.start()
    one.end.send(LeaseOrder(10, LEASE.replaced(store="/other")))
    (said,) = one.told
    assert isinstance(said, events.BrokerSaid)
    assert isinstance(said.report, LeaseStatus)
    assert said.report.state == "refused"
    assert "/other" in said.report.text


def test_a_program_that_cannot_be_executed_is_a_lost_broker(
    watched: Callable[[str], Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = watched("")
    monkeypatch.setattr("sys.executable", "/no/such/python")
    one.end.send(LeaseOrder(9, LEASE))
    assert [type(event) for event in one.told] == [events.BrokerLost]


def test_every_order_fits_into_a_message() -> None:
    long = LEASE.replaced(name="n" * 1000, test="t" * 4000, visible="v" * 100_000, paths=["/p" * 2000] * 2)
    assert len(messages.pack(LeaseOrder(1, long))) < brokering._MESSAGE_BYTES
