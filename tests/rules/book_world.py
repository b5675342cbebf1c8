"""Brokers, servers and strangers on a few devices, who do anything in any order; and what is true of each device.

A rule is wrong if the book lets go of a device, or takes a baseline of it, while it holds memory of a lease's server.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rules.books import MIB, check_invariants

from harness.broker.book import Book, Lease, Tenant, Waiter, Want, Who
from harness.broker.grants import (
    Answer,
    Granted,
    Waits,
    add_tenant,
    end,
    enqueue,
    grant,
    lease_of,
    lift,
    note_pids,
    pids_of,
    quarantine,
    remove_tenant,
    set_leaving,
    waiter_of,
    withdraw,
)
from harness.broker.readings import Fault, Reading
from harness.broker.remnants import prune
from harness.broker.verdicts import judge

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

TOTAL_MIB = {"A": 80_000, "B": 80_000, "C": 80_000, "D": 40_000}
# Of this one the driver does not tell which process holds what, and no stranger uses it.
UNTOLD = "D"
LIMIT_S = 30.0
SHARES_MIB = [1000, 9000, 30_000, 50_000]


@dataclass
class Process:
    """A server's process: on which lease, and whether its keeper is alive."""

    lease: str
    keeper: Who
    is_alive: bool = True
    keeper_is_alive: bool = True


@dataclass(frozen=True)
class Look:
    """A reading, the generation that it was begun in, and the leases whose memory was really there."""

    generation: int
    reading: Reading | Fault
    owners: frozenset[str]


@dataclass
class BookWorld:
    """Everything that happens; each step checks what must hold."""

    chance: random.Random
    book: Book = field(default_factory=Book)
    now: float = 0.0
    brokers: list[Who] = field(default_factory=list)
    dead: set[Who] = field(default_factory=set)
    stopped: set[Who] = field(default_factory=set)
    processes: dict[int, Process] = field(default_factory=dict)
    # By device and pid: the lease ("" for a stranger's) and the MiB.
    memory: dict[str, dict[int, tuple[str, int]]] = field(default_factory=lambda: {uuid: {} for uuid in TOTAL_MIB})
    # By device: what no listed process holds, the MiB of each lease.
    residue: dict[str, dict[str, int]] = field(default_factory=lambda: {uuid: {} for uuid in TOTAL_MIB})
    begun: dict[tuple[Who, str], int] = field(default_factory=dict)
    looks: dict[Who, dict[str, Look]] = field(default_factory=dict)
    # The leases whose memory somebody gave up, by lifting a quarantine himself.
    forgiven: set[tuple[str, str]] = field(default_factory=set)
    awaited: dict[str, set[str]] = field(default_factory=dict)
    count: int = 0
    happened: Counter[str] = field(default_factory=Counter)

    def step(self) -> None:
        """Let one thing happen."""
        self.now += self.chance.choice([0.01, 1.0, 10.0])
        things: list[tuple[Callable[[], None], int]] = [
            *((self.arrive, 5), (self.ask, 14), (self.begin_reading, 4), (self.end_reading, 6), (self.launch, 4)),
            *((self.allocate, 10), (self.give_back, 2), (self.exit, 4), (self.settle, 4), (self.leave, 7)),
            *((self.strangers, 3), (self.vanish, 4), (self.prune, 9), (self.lift, 1), (self.die, 2), (self.stop, 1)),
            (self.withdraw, 1),
        ]
        (thing,) = self.chance.choices([thing for thing, _ in things], [weight for _, weight in things])
        thing()
        check_invariants(self.book)

    # ---- who there is

    def living(self) -> list[Who]:
        return [broker for broker in self.brokers if broker not in self.dead and broker not in self.stopped]

    def broker(self) -> Who:
        """Give one that is alive, at times a new one."""
        living = self.living()
        if len(living) < 2 or self.chance.random() < 0.03:
            self.count += 1
            living = [Who(self.count, self.count, 7)]
            self.brokers += living
        return self.chance.choice(living)

    def lease(self) -> Lease | None:
        """Give a lease of a broker that is alive."""
        living = self.living()
        found = [lease for lease in self.book.leases if lease.broker in living]
        return self.chance.choice(found) if found else None

    def is_alive(self, who: Who) -> bool:
        keepers = {process.keeper for process in self.processes.values() if process.keeper_is_alive}
        return who in keepers or (who in self.brokers and who not in self.dead)

    # ---- the devices

    def look(self, uuid: str, generation: int) -> Look:
        if self.chance.random() < 0.05:
            return Look(generation, Fault("unknown", "it failed"), frozenset())
        listed = {pid: mib * MIB for pid, (_, mib) in self.memory[uuid].items()}
        used = sum(listed.values()) + MIB * sum(self.residue[uuid].values())
        told = dict[int, int | None](listed) if uuid != UNTOLD else None
        return Look(generation, Reading(used, TOTAL_MIB[uuid] * MIB, 2, told), self.owners(uuid))

    def owners(self, uuid: str) -> frozenset[str]:
        """Give the leases whose memory is there."""
        found = {lease for lease, _ in self.memory[uuid].values() if lease} | set(self.residue[uuid])
        return frozenset(lease for lease in found if (uuid, lease) not in self.forgiven)

    def begin_reading(self) -> None:
        uuid = self.chance.choice(list(TOTAL_MIB))
        self.begun[self.broker(), uuid] = self.book.generation(uuid)

    def end_reading(self) -> None:
        if self.begun:
            broker, uuid = self.chance.choice(list(self.begun))
            self.looks.setdefault(broker, {})[uuid] = self.look(uuid, self.begun.pop((broker, uuid)))

    def readings(self, broker: Who) -> dict[str, tuple[int, Reading | Fault]]:
        return {uuid: (look.generation, look.reading) for uuid, look in self.looks.get(broker, {}).items()}

    # ---- waiting

    def arrive(self) -> None:
        if len(self.book.waiters) < 8:
            self.count += 1
            name = f"lease{self.count}"
            candidates = self.chance.sample(list(TOTAL_MIB), self.chance.randint(1, 4))
            count = self.chance.randint(1, len(candidates))
            want = Want(count, tuple(candidates), self.chance.choice([None, *SHARES_MIB]))
            self.book = enqueue(self.book, Waiter(0, name, name, "t", self.broker(), self.now, want))

    def ask(self) -> None:
        waiters = [waiter for waiter in self.book.waiters if waiter.broker in self.living()]
        if waiters:
            self.ask_for(self.chance.choice(waiters))

    def ask_for(self, waiter: Waiter) -> Answer:
        before = self.book
        self.book, answer = grant(before, waiter.id, self.readings(waiter.broker), self.now)
        if isinstance(answer, Granted):
            self.check_grant(before, waiter, answer)
            assert grant(self.book, waiter.id, {}, self.now) == (self.book, answer)
        else:
            assert self.book == before
            self.check_that_it_must_wait(waiter)
        if isinstance(answer, Waits):
            for uuid in answer.needs:
                self.begun[waiter.broker, uuid] = self.book.generation(uuid)
                if self.chance.random() < 0.7:
                    self.looks.setdefault(waiter.broker, {})[uuid] = self.look(uuid, self.book.generation(uuid))
        elif not isinstance(answer, Granted):
            self.book = withdraw(self.book, waiter.id)
        return answer

    def check_grant(self, before: Book, waiter: Waiter, answer: Granted) -> None:
        looks = self.looks.get(waiter.broker, {})
        assert len(set(answer.devices)) == waiter.want.count
        assert set(answer.devices) <= set(waiter.want.candidates)
        assert waiter_of(self.book, waiter.id) is None
        for uuid in answer.devices:
            on_it = before.leases_on(uuid)
            self.happened["shared" if before.holders_of(uuid) else "handed over early" if on_it else "granted"] += 1
            assert uuid not in before.quarantines
            assert self.book.generation(uuid) > before.generation(uuid)
            self.check_order(before, waiter, uuid)
            if before.leases_on(uuid):
                assert self.book.baselines[uuid] == before.baselines[uuid]
            else:
                assert self.book.baselines[uuid].reading == looks[uuid].reading
            if not before.holders_of(uuid):
                assert looks[uuid].generation == before.generation(uuid)
                assert not looks[uuid].owners, f"{uuid} was given to {waiter.id} with memory of others"

    def check_order(self, before: Book, waiter: Waiter, uuid: str) -> None:
        for other in before.waiters:
            if other.ticket < waiter.ticket and uuid in other.want.candidates:
                lasting_mib = sum(self.residue[uuid].values())
                assert (other.want.memory_mib or 0) > TOTAL_MIB[uuid] - lasting_mib, f"{uuid} was awaited by {other.id}"

    def check_that_it_must_wait(self, waiter: Waiter) -> None:
        """Nobody waits for devices that nobody has or wants, and that have just been read."""
        looks = self.looks.get(waiter.broker, {})
        if waiter.want.memory_mib is not None or waiter_of(self.book, waiter.id) is None:
            return
        ahead = {uuid for one in self.book.waiters if one.ticket < waiter.ticket for uuid in one.want.candidates}
        free = [
            uuid
            for uuid in waiter.want.candidates
            if uuid not in ahead | self.book.quarantines.keys() and not self.book.leases_on(uuid) and uuid in looks
        ]
        ready = [uuid for uuid in free if looks[uuid].generation == self.book.generation(uuid)]
        readable = [uuid for uuid in ready if isinstance(looks[uuid].reading, Reading)]
        unread = set(waiter.want.candidates) - set(ready)
        assert len(readable) < waiter.want.count or unread, f"{waiter.id} waits in vain"

    def withdraw(self) -> None:
        if self.book.waiters:
            self.book = withdraw(self.book, self.chance.choice(self.book.waiters).id)

    # ---- servers

    def launch(self) -> None:
        lease = self.lease()
        if lease is not None and not lease.leaving:
            self.count += 1
            keeper = Who(self.count, self.count, 7)
            self.processes[self.count] = Process(lease.id, keeper)
            tenant = Tenant(self.count, "server", keeper, tuple(lease.devices))
            self.book = add_tenant(self.book, lease.id, tenant)

    def running(self) -> list[int]:
        return [pid for pid, process in self.processes.items() if process.is_alive]

    def allocate(self) -> None:
        """Let a server take memory. Its broker sees the process at once, unless it has died before."""
        if not (running := self.running()):
            return
        pid = self.chance.choice(running)
        lease = lease_of(self.book, self.processes[pid].lease)
        if lease is None or (lease.broker in self.dead and pids_of(lease) and pid not in pids_of(lease)):
            return
        uuid = self.chance.choice(list(lease.devices))
        if uuid in lease.leaving and self.chance.random() < 0.7:
            return
        self.memory[uuid][pid] = (lease.id, self.chance.randint(100, lease.devices[uuid] or 20_000))
        if lease.broker not in self.dead:
            self.book = note_pids(self.book, lease.id, pid, ((pid, pid),))

    def give_back(self) -> None:
        if running := self.running():
            self.free(self.chance.choice(running), is_clean=True)

    def free(self, pid: int, *, is_clean: bool) -> None:
        for uuid, listed in self.memory.items():
            lease, mib = listed.pop(pid, ("", 0))
            if mib and not is_clean:
                self.residue[uuid][lease] = self.residue[uuid].get(lease, 0) + mib

    def exit(self) -> None:
        """Let a server end, at times with memory that no process holds: for a while, or for good."""
        if running := self.running():
            pid = self.chance.choice(running)
            self.processes[pid].is_alive = self.processes[pid].keeper_is_alive = False
            self.free(pid, is_clean=self.chance.random() < 0.7)

    def vanish(self) -> None:
        """Let the driver take back what no process holds."""
        found = [uuid for uuid, left in self.residue.items() if left]
        if found:
            self.residue[self.chance.choice(found)].clear()

    def strangers(self) -> None:
        uuid = self.chance.choice([uuid for uuid in TOTAL_MIB if uuid != UNTOLD])
        theirs = [pid for pid, (lease, _) in self.memory[uuid].items() if not lease]
        if theirs and self.chance.random() < 0.6:
            self.memory[uuid].pop(self.chance.choice(theirs))
        else:
            self.count += 1
            self.memory[uuid][self.count] = ("", self.chance.randint(100, 40_000))

    # ---- what brokers do about it

    def freed(self, lease: Lease, uuid: str) -> bool:
        """Judge as a broker does, by a reading of now."""
        look = self.look(uuid, 0)
        others = [other for other in self.book.leases_on(uuid) if other.id != lease.id]
        neighbours = {pid for other in others for pid in pids_of(other)}
        own, baseline = pids_of(lease), self.book.baselines[uuid].reading
        judged = judge(
            baseline, look.reading, own=own, neighbours=neighbours, sees_pids=bool(own), is_shared=bool(others)
        )
        assert judged.verdict != "freed" or lease.id not in look.owners, f"{uuid} is not freed by {lease.id}"
        return judged.verdict == "freed"

    def settle(self) -> None:
        """End a lease all of whose servers have ended, device by device; twice, which makes no difference."""
        lease = self.lease()
        if lease is None or any(self.processes[tenant.key].is_alive for tenant in lease.tenants):
            return
        for uuid in lease.devices:
            if self.freed(lease, uuid):
                self.book = end(self.book, lease.id, [uuid])
                assert end(self.book, lease.id, [uuid]) == self.book
            elif self.chance.random() < 0.3:
                self.happened["quarantined"] += 1
                self.book = quarantine(self.book, lease.id, uuid, "it leaks", self.now)
                self.awaited.setdefault(uuid, set()).add(lease.id)
        for tenant in lease.tenants:
            if self.chance.random() < 0.2 and not any(lease.id in self.owners(uuid) for uuid in TOTAL_MIB):
                self.book = remove_tenant(self.book, lease.id, tenant.key)

    def leave(self) -> None:
        """Let a device take no room any more whose memory is back, while its server is ending."""
        lease = self.lease()
        if lease is not None and pids_of(lease):
            uuid = self.chance.choice(list(lease.devices))
            for pid in pids_of(lease):
                if self.chance.random() < 0.8:
                    self.memory[uuid].pop(pid, None)
            if self.freed(lease, uuid):
                self.book = set_leaving(self.book, lease.id, uuid)

    def die(self) -> None:
        """Kill a broker; its keepers may be killed with it, and the servers, or not."""
        if living := self.living():
            broker = self.chance.choice(living)
            self.dead.add(broker)
            leases = {lease.id for lease in self.book.leases if lease.broker == broker}
            for pid, process in self.processes.items():
                if process.lease in leases and self.chance.random() < 0.5:
                    process.keeper_is_alive = False
                    process.is_alive = process.is_alive and self.chance.random() < 0.3
                    if not process.is_alive:
                        self.free(pid, is_clean=self.chance.random() < 0.5)

    def stop(self) -> None:
        living = self.living()
        if self.stopped and self.chance.random() < 0.6:
            self.stopped.clear()
        elif living:
            self.stopped.add(self.chance.choice(living))

    def prune(self) -> None:
        broker = self.broker()
        for uuid in TOTAL_MIB if self.chance.random() < 0.6 else ():
            self.looks.setdefault(broker, {})[uuid] = self.look(uuid, self.book.generation(uuid))
        self.prune_as(broker)

    def prune_as(self, broker: Who) -> None:
        before, looks = self.book, self.looks.get(broker, {})
        readings = self.readings(broker)
        self.book, lines = prune(
            before, self.is_alive, readings, self.now, LIMIT_S, is_stopped=lambda who: who in self.stopped
        )
        for waiter in before.waiters:
            goes = waiter.broker in self.dead or waiter.broker in self.stopped
            assert (waiter not in self.book.waiters) == goes
        ended = {(one.id, uuid) for one in before.leases for uuid in one.devices}
        ended -= {(one.id, uuid) for one in self.book.leases for uuid in one.devices}
        assert len(ended) + len(before.quarantines.keys() - self.book.quarantines.keys()) <= len(lines)
        for lease_id in {lease_id for lease_id, _ in ended}:
            lease = lease_of(before, lease_id)
            assert lease is not None
            assert not any(map(self.is_alive, (lease.broker, *(one.keeper for one in lease.tenants))))
        self.check_ends(ended, lines, looks)

    def check_ends(self, ended: set[tuple[str, str]], lines: tuple[str, ...], looks: dict[str, Look]) -> None:
        for lease_id, uuid in ended:
            is_back = f"{uuid} is back from '{lease_id}' of t, whose processes are dead" in lines
            self.happened["back from the dead" if is_back else "quarantined after the dead"] += 1
            if is_back:
                assert lease_id not in looks[uuid].owners, f"{uuid} is not back from {lease_id}"
            else:
                self.awaited.setdefault(uuid, set()).add(lease_id)
        for uuid in TOTAL_MIB:
            if f"{uuid} is in quarantine no more: its memory is back" in lines:
                self.happened["lifted"] += 1
                assert not self.awaited.pop(uuid) & looks[uuid].owners, f"{uuid} was lifted too early"

    def lift(self) -> None:
        """Let a person lift a quarantine: the memory that is there is forgiven."""
        if self.book.quarantines and self.chance.random() < 0.3:
            uuid = self.chance.choice(list(self.book.quarantines))
            self.forgiven |= {(uuid, owner) for owner in self.awaited.pop(uuid)}
            self.book = lift(self.book, uuid)

    # ---- the end

    def come_to_rest(self) -> int:
        """Let everything end that holds anything up; give how many rounds it takes until nobody waits."""
        self.stopped.clear()
        rounds = 0
        while any(waiter.broker not in self.dead for waiter in self.book.waiters):
            rounds += 1
            assert rounds <= 50, "somebody waits for ever"
            self.round()
            check_invariants(self.book)
        return rounds

    def round(self) -> None:
        self.now += LIMIT_S
        for uuid in TOTAL_MIB:
            self.memory[uuid].clear()
            self.residue[uuid].clear()
        for process in self.processes.values():
            process.is_alive = process.keeper_is_alive = False
        for lease in self.book.leases:
            if lease.broker not in self.dead:
                self.book = end(self.book, lease.id, tuple(lease.devices))
        for broker in self.living():
            for uuid in TOTAL_MIB:
                self.looks.setdefault(broker, {})[uuid] = self.look(uuid, self.book.generation(uuid))
            self.prune_as(broker)
            for waiter in [waiter for waiter in self.book.waiters if waiter.broker == broker]:
                self.ask_for(waiter)
