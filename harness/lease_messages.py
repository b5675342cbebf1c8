"""The messages about devices: the client asks for a lease, the watchdog passes that on to its broker. Pure.

A lease is known by the id of the request that asked for it, a tenant (a server on a lease) by its server's key.
"""

from __future__ import annotations

from harness.records import Record

# ---- requests


class Lease(Record):
    """Wait in arrival order for `count` devices, or for these `devices` (UUIDs, or numbers of visible devices).

    0 of them are all that are visible.

    `memory_mib` is the share of each that is wanted, None for whole devices. `visible` and `order` are the values of
    CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER. It is refused after `wait_s`. A device's memory may take `release_s` to
    come back. A lease that `is_for_one` server is given back by its launch. `store` is the directory of the store, and
    `paths` are the directories in which the broker finds its libraries.
    """

    name: str
    test: str
    count: int
    devices: list[str]
    memory_mib: int | None
    visible: str | None
    order: str | None
    wait_s: float
    release_s: float
    is_for_one: bool
    store: str
    is_shared: bool
    paths: list[str]


class WaitLease(Record):
    """Reply with the lease's status once it is granted or refused, or after `timeout_s`."""

    lease: int
    timeout_s: float


class EndLease(Record):
    """Nobody is launched on this lease any more: each of its devices is given back once its memory is."""

    lease: int


# ---- replies


class LeaseStatus(Record):
    """How it is with a lease: `state` is waiting, granted, refused, absent or ended; `text` says what for or why.

    "absent": it is refused since the machine has too few devices, or none, and nothing is out of order.
    """

    lease: int
    state: str
    text: str
    devices: list[str]


class GpuProcess(Record):
    """A process that a device lists; `used_mib` is None where the driver does not tell."""

    pid: int
    used_mib: int | None
    command: str


class DeviceRelease(Record):
    """Whether a device's memory came back. `verdict` is freed, held or unknown; `note` says what is not obvious.

    `freed_at` is the monotonic time of the reading that showed it, `waited_s` the time since the stop began.
    """

    uuid: str
    index: int
    verdict: str
    baseline_mib: int | None
    peak_mib: int | None
    now_mib: int | None
    own: list[GpuProcess]
    foreign: list[GpuProcess]
    waited_s: float
    freed_at: float | None
    note: str


# ---- from the watchdog to its broker


class LeaseOrder(Record):
    """Ask for this lease."""

    lease: int
    request: Lease


class EndLeaseOrder(Record):
    """As EndLease."""

    lease: int


class TenantOrder(Record):
    """A keeper has been forked whose server will use these devices of the lease; it starts once that is recorded."""

    key: int
    lease: int
    name: str
    keeper: int
    start_time: int
    devices: list[str]


class TenantStarted(Record):
    """The server's root executes its program: one process of it is known, however short it may be on a device."""

    key: int
    pid: int
    start_time: int


class TenantAsked(Record):
    """The server has begun to end: from now on its memory may come back at any moment."""

    key: int


class TenantGone(Record):
    """No process of the server is left, or (`is_stuck`) SIGKILL does not end it."""

    key: int
    is_stuck: bool


class ClientGoneOrder(Record):
    """Nobody waits for a lease any more, and nobody is launched on one."""


# ---- from the broker to its watchdog


class TenantRecorded(Record):
    """The store names the tenant: whatever is killed from now on, its devices are given to nobody else."""

    key: int


class Released(Record):
    """What became of the memory of a tenant's devices."""

    key: int
    devices: list[DeviceRelease]
