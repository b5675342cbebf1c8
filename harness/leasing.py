"""Leases of GPUs, as the test process asks for them: one for a server, or one for a group whose servers share it."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness import asynchronous, journal
from harness.errors import GpuUnavailable, HarnessError, SpecError
from harness.lease_messages import EndLease, Lease, LeaseStatus, WaitLease
from harness.messages import Done

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from harness.link import Link
    from harness.server import Server
    from harness.specs import GpuWish

VISIBLE = "CUDA_VISIBLE_DEVICES"
ORDER = "CUDA_DEVICE_ORDER"
DEFAULT_WAIT_S = 1800.0
DEFAULT_RELEASE_S = 60.0
# How often a long wait says what it waits for; the first time sooner.
_FIRST_WORD_S = 2.0
_NEXT_WORD_S = 20.0
# The longest wait in one request: a line on a terminal moves each second.
_WAIT_S = 1.0
_LIBRARIES = ("pynvml", "filelock")
_log = logging.getLogger("harness")


@dataclass(frozen=True)
class LeaseTerms:
    """What all leases of one watchdog have in common: the store, and how long is waited for a lease and for memory."""

    store: str
    is_shared: bool
    wait_s: float
    release_s: float


def terms(state_dir: Path, wait_s: float, release_s: float) -> LeaseTerms:
    """Give the terms: the store is in $HARNESS_GPU_DIR, which several users may share, else in the state directory."""
    shared = os.environ.get("HARNESS_GPU_DIR")
    return LeaseTerms(shared or str(state_dir / "gpu"), bool(shared), wait_s, release_s)


class GpuLease:
    """Devices that nobody else is given until they have been given back, and their memory is back.

    It is made before anything is asked for, so that `end` can be called whatever interrupts what follows.
    """

    def __init__(self, link: Link, terms: LeaseTerms, name: str) -> None:
        """Take what `take` needs; `devices` are UUIDs, none before it has returned."""
        self._link = link
        self._terms = terms
        self.name = name
        self.number = link.new_key()
        self.devices: tuple[str, ...] = ()
        # For the plugin: who must give it back, and whether a launch or somebody has.
        self.owner: journal.Owner | None = None
        self.is_given_back = False

    def take(self, wish: GpuWish, *, is_for_one: bool = False) -> GpuLease:
        """Wait for the devices, in arrival order; raises GpuUnavailable if there will be none.

        A lease that `is_for_one` server is given back by its launch.
        """
        self._link.memory_s = max(self._link.memory_s, self._terms.release_s)
        self._link.lease(self.number, _request(wish, self._terms, self.name, is_for_one=is_for_one))
        began = time.monotonic()
        self.devices = _wait(self._link, self.number, self.name, self._terms.wait_s)
        self.is_given_back = is_for_one
        seconds = round(time.monotonic() - began, 6)
        journal.note("leased", self, name=self.name, devices=list(self.devices), seconds=seconds)
        return self

    def end(self) -> None:
        """Launch nothing more on it, and wait for it no longer: what it has is given back once its memory is back."""
        self.is_given_back = True
        with contextlib.suppress(HarnessError):  # the watchdog has died or was closed, or nothing was asked for
            self._link.request(EndLease(self.number), Done)


def _request(wish: GpuWish, terms: LeaseTerms, name: str, *, is_for_one: bool) -> Lease:
    named_in = os.environ if wish.named_in is None else wish.named_in
    return Lease(
        name=name,
        test=_this_test(),
        count=0 if wish.named_in is not None else wish.count,
        devices=list(wish.devices),
        memory_mib=wish.memory_mib,
        visible=named_in.get(VISIBLE),
        order=named_in.get(ORDER),
        wait_s=terms.wait_s,
        release_s=terms.release_s,
        is_for_one=is_for_one,
        store=terms.store,
        is_shared=terms.is_shared,
        paths=_paths(),
    )


def _this_test() -> str:
    # pytest sets it: "tests/test_a.py::test_b (call)".
    return os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0] or Path(sys.argv[0]).name


def _paths() -> list[str]:
    # The broker does not run the test process's site configuration, so it is told where its two libraries are.
    found = [importlib.util.find_spec(name) for name in _LIBRARIES]
    origins = [Path(spec.origin) for spec in found if spec is not None and spec.origin is not None]
    folders = [origin.parent.parent if origin.name == "__init__.py" else origin.parent for origin in origins]
    return list(dict.fromkeys(map(str, folders)))


def _wait(link: Link, number: int, name: str, limit_s: float) -> tuple[str, ...]:
    wait = journal.Wait("gpus", [name], limit_s)
    try:
        return _granted(link, number, name, wait)
    finally:
        wait.end()


def _granted(link: Link, number: int, name: str, wait: journal.Wait) -> tuple[str, ...]:
    next_word_s = _FIRST_WORD_S
    while True:
        status = link.request(WaitLease(number, _WAIT_S), LeaseStatus, timeout_s=_WAIT_S)
        if status.state == "granted":
            return tuple(status.devices)
        if status.state != "waiting":
            error = GpuUnavailable(f"{name!r}: {status.text}", server=name)
            error.is_absent = status.state == "absent"
            raise error
        wait.say(status.text)
        if wait.seconds >= next_word_s:
            next_word_s = wait.seconds + _NEXT_WORD_S
            _log.warning("%r has waited %.0f s for its GPUs: %s", name, wait.seconds, status.text)


class Share:
    """A server's part of a group's lease. As a context manager around its launch it takes it back if that fails."""

    def __init__(self, lease: GpuLease, devices: tuple[str, ...]) -> None:
        """Take the lease, and the server's devices."""
        self.lease = lease
        self.devices = devices
        self.server: Server | None = None
        self._has_failed = False

    @property
    def is_taken(self) -> bool:
        """Say whether its server is being launched, or has not been stopped yet."""
        return not self._has_failed and (self.server is None or self.server.outcome is None)

    def __enter__(self) -> Share:  # noqa: PYI034 - typing.Self is there from Python 3.11 on
        """Begin the launch."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the launch."""
        self._has_failed = error is not None


class SharedLease:
    """The lease of a group, taken by its first launch. Each server takes its share of the devices, or sees them all."""

    def __init__(self, make: Callable[[], GpuLease], wish: GpuWish) -> None:
        """Take how a lease is made, and what is wanted."""
        self._make = make
        self._wish = wish
        self._changed = threading.Condition()
        self._lease: GpuLease | None = None  # it has no devices as long as a thread waits for them
        self._shares: list[Share] = []
        self._is_closed = False

    def share(self, wish: GpuWish | None) -> Share:
        """Give a server its share.

        Raises SpecError if the group has too few devices left, GpuUnavailable as `GpuLease.take` does.
        """
        while True:
            with self._changed:
                self._check_open()
                if self._lease is None:
                    lease = self._lease = self._make()
                    break
                if self._lease.devices:
                    return self._shared(self._lease, wish)
                asynchronous.check()
                self._changed.wait(asynchronous.slice_s(_NEXT_WORD_S))  # another thread's launch waits for all of them
        try:
            # Without the lock: whoever stops the group meanwhile ends this wait.
            lease.take(self._wish)
        except BaseException:
            self._forget(lease)
            raise
        with self._changed:
            self._changed.notify_all()
            if self._lease is lease:
                return self._shared(lease, wish)
        raise HarnessError("the group was stopped while its GPUs were waited for")

    def _check_open(self) -> None:
        if self._is_closed:
            raise HarnessError("the group has been left: it leases nothing more")

    def _shared(self, lease: GpuLease, wish: GpuWish | None) -> Share:
        if wish is None:
            return Share(lease, lease.devices)
        share = Share(lease, self._chosen(wish, lease.devices))
        self._shares.append(share)
        return share

    def _forget(self, lease: GpuLease) -> None:
        with self._changed:
            if self._lease is lease:
                self._lease = None
            self._changed.notify_all()
        lease.end()  # Ctrl-C, a test's deadline: nobody will ever hold it

    def _chosen(self, wish: GpuWish, devices: tuple[str, ...]) -> tuple[str, ...]:
        if wish.memory_mib is not None:
            raise SpecError("gpu_memory_mib= cannot be had in a group with gpus=: its servers share whole devices")
        if wish.devices:
            return tuple(_find(devices, wanted) for wanted in wish.devices)
        taken = {uuid for share in self._shares if share.is_taken for uuid in share.devices}
        free = [uuid for uuid in devices if uuid not in taken]
        if len(free) < wish.count:
            raise SpecError(
                f"{wish.count} GPUs are wanted, but of the group's {len(devices)} only {len(free)} are not taken"
            )
        return tuple(free[: wish.count])

    def end(self) -> None:
        """Give the devices back, as soon as their memory is; a later launch takes another lease."""
        with self._changed:
            lease, self._lease = self._lease, None
            self._shares = []
            self._changed.notify_all()
        if lease is not None:
            lease.end()

    def close(self) -> None:
        """Lease nothing more; `end` follows."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


def _find(devices: tuple[str, ...], wanted: str) -> str:
    if wanted.isdecimal() and int(wanted) < len(devices):
        return devices[int(wanted)]
    found = [uuid for uuid in devices if not wanted.isdecimal() and uuid.startswith(wanted)]
    if len(found) != 1:
        raise SpecError(f"gpus: {wanted!r} is not one of the group's {len(devices)} devices")
    return found[0]
