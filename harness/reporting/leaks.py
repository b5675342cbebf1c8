"""What a test, or a fixture of a wider scope, has left behind when it was torn down."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from harness import listeners, logs, procfs, shutdowns
from harness.errors import HarnessError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.journal import Owner
    from harness.leasing import GpuLease
    from harness.reporting.witness import Witness
    from harness.server import Server

# A server may be on its way out: the first is how long one is waited for whose root has exited or been sent a signal,
# the second any other. All of an owner's have this time together.
_LEAVING_S = 1.0
_MOMENT_S = 0.25
# Of the phases of a server those in which nobody has begun to end it: no stop, no deadline, not the loss of its keeper.
_LEFT = frozenset({"launching", "running", "detached"})


class Leak(NamedTuple):
    """Something that was left behind: a server that runs, a lease, or a port of a server that has ended."""

    text: str
    server: Server | None = None
    lease: GpuLease | None = None


def left_by(owner: Owner, witness: Witness) -> list[Leak]:
    """Give what an owner has left, each thing once."""
    servers = witness.of(owner)
    began = time.monotonic()
    running = [server for server in servers if _runs(server, witness, began) and witness.charge(server)]
    found = [Leak(_server(server, owner), server=server) for server in running]
    # The devices of a server that runs cannot be given back; that it runs says enough.
    taken = {uuid for server in running for uuid in server.gpus}
    leases = [lease for lease in witness.leases_of(owner) if not taken.intersection(lease.devices)]
    found += [Leak(_lease(lease, owner), lease=lease) for lease in leases if witness.charge(lease)]
    return found + [Leak(text) for server in servers if witness.charge((server, "ports")) for text in _ports(server)]


def _runs(server: Server, witness: Witness, began: float) -> bool:
    if server.has_ended:
        return False
    status = witness.status(server)
    if status is None or status.phase not in _LEFT:
        return False  # of a watchdog that hangs nothing is known
    is_leaving = server.was_signalled or not procfs.is_alive(server.pid, server.start_time)
    limit_s = (_LEAVING_S if is_leaving else _MOMENT_S) - (time.monotonic() - began)
    try:
        return not server.wait_until("gone", max(0.0, limit_s))
    except HarnessError:
        return False


def _by(owner: Owner) -> str:
    return "this test" if owner.scope == "function" else f"fixture {owner.name!r} (scope {owner.scope})"


def _server(server: Server, owner: Owner) -> str:
    ports = ", ".join(str(port) for port in server.ports_by_name.values())
    facts = (
        f"pid {server.pid}" + f", port {ports}" * bool(ports) + f", up {time.monotonic() - server.launched_at:.2f} s"
    )
    what = f"server {server.name!r} ({facts}) was launched by {_by(owner)} and left running"
    return f"{what}: stop it, or launch it in a group that is left, as server_group is (its log: {server.log_path})"


def _lease(lease: GpuLease, owner: Owner) -> str:
    devices = ", ".join(lease.devices)
    return f"{devices} were leased by {_by(owner)} for {lease.name!r} and not given back: leave or stop that group"


def _ports(server: Server) -> list[str]:
    if server.ended_at is None:
        return []
    found = []
    for port in server.ports_by_name.values():
        found += [
            f"port {port} of server {server.name!r}, which has ended, is still held by pid {pid}"
            f" ({logs.printable(procfs.name(pid))})"
            for pid in listeners.holders(port)
            if _is_from(server, pid)
        ]
    return found


def _is_from(server: Server, pid: int) -> bool:
    """Say whether a process began while a server ran: another that has its port now may have taken it since."""
    stat = procfs.stat(pid)
    if stat is None or server.ended_at is None:
        return False
    return server.launched_at <= time.monotonic() - procfs.age_s(stat) <= server.ended_at


def end(leaks: Sequence[Leak]) -> None:
    """Stop the servers, all in parallel, and give the leases back; what fails is raised when all is done."""
    stops = shutdowns.stops_of(leak.server for leak in leaks if leak.server is not None)
    shutdowns.run(stops, [leak.lease.end for leak in leaks if leak.lease is not None])
