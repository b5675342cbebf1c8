"""Leases as the watchdog sees them, event by event: who is told what, whatever the broker does or does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from rules.driven_supervisor import DrivenSupervisor as Driven
from rules.driven_supervisor import launch_of
from rules.test_messages import LEASE

from harness.lease_messages import (
    ClientGoneOrder,
    DeviceRelease,
    EndLease,
    EndLeaseOrder,
    LeaseOrder,
    LeaseStatus,
    Released,
    TenantAsked,
    TenantGone,
    TenantOrder,
    TenantRecorded,
    TenantStarted,
    WaitLease,
)
from harness.messages import Close, Done, Failed, Launched, Survivor
from harness.watchdog import events
from harness.watchdog.leases import BROKER_ANSWER_S, MOST_LEASES
from harness.watchdog.supervisor import LAUNCH_LIMIT_S

if TYPE_CHECKING:
    from harness.messages import BrokerOrder, Reply

FREED = DeviceRelease("GPU-1", 0, "freed", 0, 900, 0, [], [], 0.5, 1001.0, "")
HELD = FREED.replaced(verdict="held", now_mib=900, freed_at=None)
DEATH = "the broker of GPUs has died"


class Leasing(Driven):
    """A supervisor whose broker's orders are kept."""

    @property
    def orders(self) -> list[BrokerOrder]:
        """Everything that the broker was told."""
        return [effect.order for effect in self.made(events.TellBroker)]

    def say(self, report: LeaseStatus | TenantRecorded | Released) -> None:
        self.tell(events.BrokerSaid(report))

    def wanted(self) -> int:
        """Ask for a lease, and give its number."""
        lease = self.request(LEASE)
        assert self.reply(lease) == Done()
        return lease

    def granted(self) -> int:
        lease = self.wanted()
        self.say(LeaseStatus(lease, "granted", "", ["GPU-1"]))
        return lease

    def launched(self, lease: int) -> int:
        """Request a launch on the lease; its keeper has been forked and waits."""
        key = self.request(launch_of("a", lease=lease, devices=["GPU-1"]))
        self.tell(events.KeeperForked(key, self.made(events.Spawn)[-1].launch, 200 + key, 77))
        return key

    def tenant(self) -> int:
        """Give the key of a server that runs on a lease."""
        key = self.launched(self.granted())
        self.say(TenantRecorded(key))
        self.tell(events.Started(key, 100 + key, 7, 200 + key, {}))
        return key

    def wait(self, lease: int, timeout_s: float = 20.0) -> int:
        return self.request(WaitLease(lease, timeout_s))

    def status_of(self, lease: int) -> Reply:
        return self.reply(self.wait(lease, 0.0))


def test_a_lease_is_asked_for_and_waited_for() -> None:
    driven = Leasing()
    lease = driven.wanted()
    assert driven.orders == [LeaseOrder(lease, LEASE)]
    wait = driven.wait(lease)
    assert not driven.replies[wait]
    assert driven.deadline_s == 20.0
    driven.say(LeaseStatus(lease, "waiting", "for GPU 0", []))
    assert not driven.replies[wait]
    driven.say(LeaseStatus(lease, "granted", "", ["GPU-1"]))
    assert driven.reply(wait) == LeaseStatus(lease, "granted", "", ["GPU-1"])
    assert driven.deadline_s is None, "it has been patient enough with the broker"


def test_a_wait_that_ends_says_what_is_waited_for() -> None:
    driven = Leasing()
    lease = driven.wanted()
    waits = [driven.wait(lease, 5.0), driven.wait(lease, 8.0)]
    driven.say(LeaseStatus(lease, "waiting", "for GPU 0", []))
    driven.tick(5.0)
    assert driven.reply(waits[0]) == LeaseStatus(lease, "waiting", "for GPU 0", [])
    assert not driven.replies[waits[1]]
    assert driven.deadline_s == 8.0


def test_no_root_is_started_before_the_store_names_its_keeper() -> None:
    driven = Leasing()
    key = driven.launched(driven.granted())
    assert driven.orders[1:] == [TenantOrder(key, 1000, "a", 200 + key, 77, ["GPU-1"])]
    assert not driven.made(events.Go)
    driven.say(TenantRecorded(key))
    assert driven.made(events.Go) == [events.Go(key)]
    driven.tell(events.Started(key, 101, 7, 201, {}))
    assert isinstance(driven.reply(key), Launched)
    assert driven.orders[-1] == TenantStarted(key, 101, 7)


def test_a_launch_that_names_no_device_of_its_lease_is_refused() -> None:
    driven = Leasing()
    reply = driven.reply(driven.request(launch_of("a", lease=driven.granted())))
    assert isinstance(reply, Failed)
    assert not driven.made(events.Spawn)


@pytest.mark.parametrize("state", ["none", "waiting", "refused", "ended", "other device"])
def test_a_launch_without_a_lease_that_is_held_is_refused(state: str) -> None:
    driven = Leasing()
    lease = 1000
    if state != "none":
        lease = driven.wanted()
    if state == "refused":
        driven.say(LeaseStatus(lease, "refused", "there is none", []))
    if state == "ended":
        driven.request(EndLease(lease))
    if state == "other device":
        driven.say(LeaseStatus(lease, "granted", "", ["GPU-2"]))
    reply = driven.reply(driven.request(launch_of("a", lease=lease, devices=["GPU-1"])))
    assert isinstance(reply, Failed)
    assert reply.error == "GpuUnavailable"
    assert not driven.made(events.Spawn)


def test_a_stop_waits_for_the_memory_too() -> None:
    driven = Leasing()
    key = driven.tenant()
    stop = driven.stop(key)
    assert driven.orders[-1] == TenantAsked(key)
    driven.tell(events.RootExited(key, 0))
    driven.at(1.0).tell(events.TreeGone(key))
    assert driven.orders[-1] == TenantGone(key, is_stuck=False)
    assert not driven.replies[stop]
    driven.at(3.0)
    driven.say(Released(key, [FREED]))
    (outcome,) = driven.stopped(stop).outcomes
    assert outcome.gpu == [FREED]
    assert outcome.seconds == 1.0
    assert driven.stopped(stop).seconds == 3.0
    assert driven.deadline_s is None


def test_the_broker_is_told_once_that_a_server_begins_to_end_and_once_that_it_has() -> None:
    driven = Leasing()
    key = driven.tenant()
    driven.stop(key)
    driven.tell(events.RootExited(key, 0))
    driven.stop(key, kill=True)
    driven.tell(events.TreeStuck(key, [Survivor(7, "D", "", "")]))
    driven.tell(events.TreeGone(key))
    assert driven.orders[3:] == [TenantAsked(key), TenantGone(key, is_stuck=True)]


def test_a_root_that_exits_by_itself_may_leave_a_tree_that_takes_memory_later() -> None:
    """A daemon: its device must not be handed over as if it were being stopped."""
    driven = Leasing()
    key = driven.tenant()
    driven.tell(events.RootExited(key, 0))
    assert driven.orders[3:] == []
    driven.stop(key)
    assert driven.orders[3:] == [TenantAsked(key)]


def test_memory_that_is_back_before_the_tree_has_ended_does_not_end_the_stop() -> None:
    driven = Leasing()
    key = driven.tenant()
    stop = driven.stop(key)
    driven.say(Released(key, [FREED]))
    assert not driven.replies[stop]
    driven.tell(events.TreeGone(key))
    assert driven.stopped(stop).outcomes[0].gpu == [FREED]


def test_what_is_held_is_reported_to_every_stop() -> None:
    driven = Leasing()
    key = driven.tenant()
    stops = [driven.stop(key), driven.stop(key, kill=True)]
    driven.tell(events.TreeGone(key))
    driven.say(Released(key, [HELD]))
    late = driven.stop(key)
    assert [driven.stopped(stop).outcomes[0].gpu for stop in (*stops, late)] == [[HELD]] * 3


def test_a_second_verdict_changes_nothing() -> None:
    driven = Leasing()
    key = driven.tenant()
    stop = driven.stop(key)
    driven.tell(events.TreeGone(key))
    driven.say(Released(key, [FREED]))
    driven.say(Released(key, [HELD]))
    assert driven.stopped(stop).outcomes[0].gpu == [FREED]
    assert driven.stopped(driven.stop(key)).outcomes[0].gpu == [FREED]


def test_a_broker_that_says_nothing_holds_up_a_stop_only_so_long() -> None:
    driven = Leasing()
    key = driven.tenant()
    stop = driven.stop(key)
    driven.at(2.0).tell(events.TreeGone(key))
    limit_s = 2.0 + LEASE.release_s + BROKER_ANSWER_S
    assert driven.deadline_s == limit_s
    driven.tick(limit_s)
    (row,) = driven.stopped(stop).outcomes[0].gpu
    assert (row.uuid, row.verdict) == ("GPU-1", "unknown")
    assert driven.made(events.EndBroker), "the next one judges"


def test_a_broker_that_says_nothing_holds_up_a_lease_only_so_long() -> None:
    driven = Leasing()
    lease, granted = driven.wanted(), driven.granted()
    wait = driven.wait(lease, 1000.0)
    driven.say(LeaseStatus(lease, "waiting", "for GPU 0", []))
    limit_s = LEASE.wait_s + BROKER_ANSWER_S
    assert driven.deadline_s == limit_s
    driven.tick(limit_s)
    reply = driven.reply(wait)
    assert isinstance(reply, LeaseStatus)
    assert (reply.state, reply.text) == ("refused", "the broker of GPUs does not answer: it is stopped, or hangs")
    assert driven.made(events.EndBroker) == [events.EndBroker()]
    assert driven.deadline_s is None
    assert driven.status_of(granted) == LeaseStatus(granted, "granted", "", ["GPU-1"])


@pytest.mark.parametrize("end", ["given back", "broker", "client"])
def test_nobody_is_impatient_for_a_lease_that_is_not_wanted(end: str) -> None:
    driven = Leasing()
    lease = driven.wanted()
    if end == "given back":
        driven.request(EndLease(lease))
    elif end == "broker":
        driven.tell(events.BrokerLost(DEATH))
    else:
        driven.tell(events.ClientGone("test"))
    assert driven.deadline_s is None


def test_a_broker_that_dies_is_an_unknown_verdict_for_all_and_refuses_all() -> None:
    driven = Leasing()
    running, waited = driven.tenant(), driven.wanted()
    wait = driven.wait(waited)
    stop = driven.stop(running)
    driven.tell(events.TreeGone(running))
    driven.tell(events.BrokerLost(DEATH))
    assert driven.stopped(stop).outcomes[0].gpu[0].note == DEATH
    assert driven.reply(wait) == LeaseStatus(waited, "refused", DEATH, [])
    assert driven.status_of(waited) == LeaseStatus(waited, "refused", DEATH, [])


def test_a_word_that_comes_too_late_changes_nothing() -> None:
    driven = Leasing()
    key = driven.launched(driven.granted())
    driven.tell(events.BrokerLost(DEATH))
    driven.say(TenantRecorded(key))
    driven.say(TenantRecorded(key + 1))
    assert not driven.made(events.Go)


def test_a_server_goes_on_when_the_broker_dies() -> None:
    driven = Leasing()
    key = driven.tenant()
    driven.tell(events.BrokerLost(DEATH))
    assert driven.phase(key) == "running"
    stop = driven.stop(key)
    driven.tell(events.TreeGone(key))
    assert driven.stopped(stop).outcomes[0].gpu[0].verdict == "unknown"


@pytest.mark.parametrize("loss", ["broker", "record"])
def test_a_keeper_that_waits_for_the_word_is_ended_if_it_will_not_come(loss: str) -> None:
    driven = Leasing()
    key = driven.launched(driven.granted())
    if loss == "broker":
        driven.tell(events.BrokerLost(DEATH))
    else:
        driven.say(Released(key, [FREED.replaced(verdict="unknown", note="no room")]))
    reply = driven.reply(key)
    assert isinstance(reply, Failed)
    assert (DEATH if loss == "broker" else "no room") in reply.message
    assert driven.latest_acts == [events.Kill([key])]
    driven.tell(events.LaunchFailed(key, "it was stopped"))
    assert driven.phase(key) == "gone"
    assert not driven.made(events.Go)


def test_a_broker_that_hangs_does_not_hold_up_a_launch_for_good() -> None:
    driven = Leasing()
    key = driven.launched(driven.granted())
    driven.tick(LAUNCH_LIMIT_S)
    assert isinstance(driven.reply(key), Failed)
    driven.say(TenantRecorded(key))
    driven.tell(events.TreeGone(key))
    assert driven.orders[-1] == TenantGone(key, is_stuck=False)


def test_a_lease_that_is_given_back_is_known_no_more() -> None:
    driven = Leasing()
    lease = driven.granted()
    assert driven.reply(driven.request(EndLease(lease))) == Done()
    assert driven.orders[-1] == EndLeaseOrder(lease)
    driven.say(LeaseStatus(lease, "granted", "", ["GPU-1"]))
    for request in (EndLease(lease), WaitLease(lease, 1.0)):
        assert isinstance(driven.reply(driven.request(request)), Failed)


def test_who_waits_for_a_lease_that_is_given_back_is_told() -> None:
    driven = Leasing()
    lease, other = driven.wanted(), driven.wanted()
    waits = [driven.wait(lease), driven.wait(other)]
    driven.request(EndLease(lease))
    assert driven.reply(waits[0]) == LeaseStatus(lease, "ended", "the lease has been given back", [])
    assert not driven.replies[waits[1]]


@pytest.mark.parametrize("by", ["close", "client"])
def test_nobody_waits_for_a_lease_once_the_watchdog_is_to_end(by: str) -> None:
    driven = Leasing()
    wait = driven.wait(driven.wanted())
    close = driven.request(Close()) if by == "close" else None
    if close is None:
        driven.tell(events.ClientGone("test"))
    assert driven.orders[-1] == ClientGoneOrder()
    assert isinstance(driven.reply(wait), Failed)
    assert isinstance(driven.reply(driven.request(LEASE)), Failed)
    assert driven.made(events.Leave)


def test_without_a_lease_the_broker_is_not_told_of_the_end() -> None:
    driven = Leasing()
    driven.request(Close())
    assert driven.orders == []


def test_close_waits_for_the_memory_and_a_client_that_has_gone_does_not() -> None:
    for is_closed in (True, False):
        driven = Leasing()
        key = driven.tenant()
        if is_closed:
            driven.request(Close())
        else:
            driven.tell(events.ClientGone("test"))
        driven.tell(events.TreeGone(key))
        assert bool(driven.made(events.Leave)) == (not is_closed)
        driven.say(Released(key, [FREED]))
        assert driven.made(events.Leave)


def test_a_number_is_a_lease_once_and_a_client_has_only_so_many() -> None:
    driven = Leasing()
    lease = driven.wanted()
    driven.tell(events.Requested(lease, LEASE))
    assert isinstance(driven.replies[lease][1], Failed)
    for _ in range(MOST_LEASES - 1):
        driven.wanted()
    assert isinstance(driven.reply(driven.request(LEASE)), Failed)
    for _ in range(MOST_LEASES):
        assert not driven.replies[driven.wait(lease)]
    assert isinstance(driven.reply(driven.wait(lease)), Failed)
    assert len(driven.orders) == MOST_LEASES


def test_a_lease_for_one_server_is_given_back_by_its_launch() -> None:
    """An interrupt may strike the client before it says so."""
    driven = Leasing()
    lease = driven.request(LEASE.replaced(is_for_one=True))
    driven.say(LeaseStatus(lease, "granted", "", ["GPU-1"]))
    key = driven.launched(lease)
    assert driven.orders[1:] == [TenantOrder(key, lease, "a", 200 + key, 77, ["GPU-1"]), EndLeaseOrder(lease)]
    assert isinstance(driven.reply(driven.request(EndLease(lease))), Failed)
    driven.say(TenantRecorded(key))
    assert driven.made(events.Go) == [events.Go(key)]
    driven.tell(events.TreeGone(key))
    assert driven.orders[-1] == TenantGone(key, is_stuck=False)


def test_the_devices_of_a_lease_can_become_fewer() -> None:
    driven = Leasing()
    lease = driven.granted()
    driven.say(LeaseStatus(lease, "granted", "", []))
    reply = driven.reply(driven.request(launch_of("a", lease=lease, devices=["GPU-1"])))
    assert isinstance(reply, Failed)
    assert "GPU-1 is not on its lease" in reply.message
