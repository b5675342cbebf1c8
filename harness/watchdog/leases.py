"""What the watchdog knows of leases: which are wanted or held, and whose memory is still waited for. Pure.

The broker decides; here every request about a lease gets its reply, also when the broker hangs or dies.
"""

from __future__ import annotations

from harness.lease_messages import (
    ClientGoneOrder,
    DeviceRelease,
    EndLease,
    EndLeaseOrder,
    Lease,
    LeaseOrder,
    LeaseStatus,
    TenantAsked,
    TenantGone,
    TenantOrder,
    TenantStarted,
)
from harness.messages import Done, Failed
from harness.watchdog import events
from harness.watchdog.deadlines import Deadlines

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

    from harness.lease_messages import WaitLease
    from harness.messages import Launch
    from harness.watchdog.events import Effect

    Unjudged: TypeAlias = dict[int, list[DeviceRelease]]

# How much longer than its own limit the broker may take to say what became of a device.
BROKER_ANSWER_S = 10.0
# Each thread of a client waits for one lease.
MOST_LEASES = 1024
_SILENT = "the broker of GPUs does not answer: it is stopped, or hangs"


class Leases:
    """The leases of one watchdog, and the tenants whose memory has not come back yet."""

    def __init__(self) -> None:
        """Begin with none."""
        self._requests: dict[int, Lease] = {}
        self._known: dict[int, LeaseStatus] = {}
        self._waits: list[tuple[int, int, float]] = []
        self._tenants: dict[int, tuple[list[str], float]] = {}
        self._asked: set[int] = set()
        self._gone: set[int] = set()
        self._deadlines = Deadlines()  # of the verdicts on tenants
        self._patience = Deadlines()  # with the broker, which is to grant or refuse a lease

    def next_deadline(self) -> float | None:
        """Give when `due` has to be called next, or None."""
        times = [deadline for _, _, deadline in self._waits]
        times += [time for time in (self._deadlines.next(), self._patience.next()) if time is not None]
        return min(times, default=None)

    # ---- what the client asks

    def request(self, request_id: int, request: Lease | WaitLease | EndLease, now: float) -> list[Effect]:
        """Take a request; its reply comes now or, for WaitLease, later."""
        if isinstance(request, Lease):
            return self._lease(request_id, request, now)
        if request.lease not in self._known:
            return [events.Answer(request_id, Failed("SpecError", f"this watchdog has no lease {request.lease}"))]
        if isinstance(request, EndLease):
            return [events.Answer(request_id, Done()), *self._end(request.lease)]
        if len(self._waits) >= MOST_LEASES:
            return [events.Answer(request_id, Failed("HarnessError", f"{MOST_LEASES} threads wait for leases"))]
        self._waits.append((request_id, request.lease, now + request.timeout_s))
        return self._settled(now)

    def _lease(self, request_id: int, request: Lease, now: float) -> list[Effect]:
        if len(self._known) >= MOST_LEASES or request_id in self._known:
            return [events.Answer(request_id, Failed("HarnessError", "there is no room for this lease"))]
        self._known[request_id] = LeaseStatus(request_id, "waiting", "for the broker", [])
        self._requests[request_id] = request
        self._patience.set(request_id, now + request.wait_s + BROKER_ANSWER_S)
        order = LeaseOrder(request_id, request)
        return [events.Answer(request_id, Done()), events.TellBroker(order)]

    def _end(self, lease: int) -> list[Effect]:
        del self._requests[lease]
        self._patience.set(lease, None)
        status = self._known.pop(lease).replaced(state="ended", text="the lease has been given back", devices=[])
        ended = [request_id for request_id, waited, _ in self._waits if waited == lease]
        self._waits = [wait for wait in self._waits if wait[1] != lease]
        effects: list[Effect] = [events.Answer(request_id, status) for request_id in ended]
        return [*effects, events.TellBroker(EndLeaseOrder(lease))]

    def refusal(self, launch: Launch) -> str:
        """Say why this launch cannot be: its lease is not held, or does not have these devices; "" if it can."""
        if launch.lease is None:
            return ""
        if not launch.devices:
            return f"{launch.name!r}: it names no device of its lease"
        status = self._known.get(launch.lease)
        if status is None or status.state != "granted":
            return f"{launch.name!r}: its lease is not held" + (f": {status.text}" if status and status.text else "")
        foreign = sorted(set(launch.devices) - set(status.devices))
        return f"{launch.name!r}: {foreign[0]} is not on its lease" if foreign else ""

    def close(self) -> list[Effect]:
        """Give every lease back, and wait for none: nothing is launched any more."""
        lost = [request_id for request_id, _, _ in self._waits]
        self._waits = []
        effects: list[Effect] = [
            events.Answer(request_id, Failed("HarnessError", "the watchdog is stopping")) for request_id in lost
        ]
        if self._known:
            effects.append(events.TellBroker(ClientGoneOrder()))
        for lease in self._known:
            self._patience.set(lease, None)
        self._known = {}
        self._requests = {}
        return effects

    # ---- what happens to tenants

    def forked(self, key: int, launch: Launch, keeper: int, start_time: int) -> list[Effect]:
        """Have the store name a keeper whose root is not there yet. A lease for one server is given back with that."""
        lease = launch.lease or 0
        request = self._requests[lease]
        self._tenants[key] = (launch.devices, request.release_s)
        order = TenantOrder(key, lease, launch.name, keeper, start_time, launch.devices)
        # Here, and not when the client says so: an interrupt may strike there first, and the lease would stay for good.
        return [events.TellBroker(order), *(self._end(lease) if request.is_for_one else [])]

    def started(self, key: int, pid: int, start_time: int) -> list[Effect]:
        """Tell the broker who the root of a server is."""
        return [events.TellBroker(TenantStarted(key, pid, start_time))] if key in self._tenants else []

    def is_tenant(self, key: int) -> bool:
        """Say whether the broker has not said yet what became of this server's memory."""
        return key in self._tenants

    def asked(self, keys: list[int]) -> list[Effect]:
        """Have the broker look closely: these servers have begun to end."""
        fresh = [key for key in keys if key in self._tenants and key not in self._asked]
        self._asked.update(fresh)
        return [events.TellBroker(TenantAsked(key)) for key in fresh]

    def gone(self, key: int, now: float, *, is_stuck: bool) -> list[Effect]:
        """Have the broker judge: nothing of this server is left, or never will be less."""
        if key not in self._tenants or key in self._gone:
            return []
        self._gone.add(key)
        self._deadlines.set(key, now + self._tenants[key][1] + BROKER_ANSWER_S)
        return [events.TellBroker(TenantGone(key, is_stuck))]

    def released(self, key: int) -> bool:
        """Take note of the broker's verdict; False if none was waited for."""
        self._deadlines.set(key, None)
        return self._tenants.pop(key, None) is not None

    # ---- what the broker says, or does not

    def told(self, status: LeaseStatus, now: float) -> list[Effect]:
        """Take note of how it is with a lease; one that has been given back meanwhile is not known any more."""
        if status.lease not in self._known:
            return []
        self._known[status.lease] = status
        if status.state != "waiting":
            self._patience.set(status.lease, None)
        return self._settled(now)

    def due(self, now: float) -> tuple[Unjudged, list[Effect]]:
        """Give the tenants whose verdict has not come in time, and reply to those who have waited long enough.

        A broker that is silent for so long is stopped, or hangs: it is ended, so that the next one judges.
        """
        unjudged = {key: self._unknown(key, _SILENT) for key in self._deadlines.take(now)}
        unanswered = self._patience.take(now)
        for lease in unanswered:
            self._known[lease] = LeaseStatus(lease, "refused", _SILENT, [])
        ended: list[Effect] = [events.EndBroker()] if unjudged or unanswered else []
        return unjudged, [*ended, *self._settled(now)]

    def broker_lost(self, reason: str, now: float) -> tuple[Unjudged, list[Effect]]:
        """Give the tenants whose verdict will never come; every lease that is wanted or held is refused from now on."""
        for lease, status in self._known.items():
            self._known[lease] = status.replaced(state="refused", text=reason, devices=[])
            self._patience.set(lease, None)
        return {key: self._unknown(key, reason) for key in self._tenants}, self._settled(now)

    def _unknown(self, key: int, reason: str) -> list[DeviceRelease]:
        return [
            DeviceRelease(uuid, -1, "unknown", None, None, None, [], [], 0.0, None, reason)
            for uuid in self._tenants[key][0]
        ]

    def _settled(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        still: list[tuple[int, int, float]] = []
        for request_id, lease, deadline in self._waits:
            if self._known[lease].state != "waiting" or deadline <= now:
                effects.append(events.Answer(request_id, self._known[lease]))
            else:
                still.append((request_id, lease, deadline))
        self._waits = still
        return effects
