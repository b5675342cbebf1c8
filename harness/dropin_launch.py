"""How drop-ins launch a server: on a port that its user has chosen, and with the memory of its GPUs watched."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from harness import listeners, specs
from harness.broker.book import WATCHED_MIB
from harness.errors import GpuUnavailable, LaunchFailed
from harness.leasing import VISIBLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.client import Watchdog
    from harness.server import Server

_log = logging.getLogger("harness")


def launch(
    watchdog: Watchdog, spec: specs.ServerSpec, register: Callable[[Server], None], *, watches_gpus: bool
) -> Server:
    """Launch a server; with `watches_gpus` and no wish for GPUs, those that its environment names are watched.

    `register` is given it before anything can interrupt that, so that it can be stopped whatever strikes from then on.
    Raises LaunchFailed, which says who listens on its port, or GpuUnavailable: also where one of the devices that it
    sees is quarantined, since its memory has not come back.
    """
    __tracebackhide__ = True  # the specification holds the environment
    try:
        return _launch(watchdog, spec, register, watches_gpus=watches_gpus)
    except LaunchFailed as error:
        listening = listeners.describe(spec.port) if spec.port is not None else ""
        raise LaunchFailed(error.message + listening, server=error.server) from None


def _launch(
    watchdog: Watchdog, spec: specs.ServerSpec, register: Callable[[Server], None], *, watches_gpus: bool
) -> Server:
    __tracebackhide__ = True
    if spec.gpus is None and watches_gpus and not _may_be_leased(watchdog, spec.environment.get(VISIBLE)):
        try:
            watched = replace(spec, gpus=specs.GpuWish(0, (), WATCHED_MIB, spec.environment))
            return watchdog.launch_spec(watched, register)
        except GpuUnavailable as error:
            if not error.is_absent:
                raise
            _log.info("%r: the memory of its GPUs is not watched: %s", spec.name, error.message)
    return watchdog.launch_spec(spec, register)


def _may_be_leased(watchdog: Watchdog, visible: str | None) -> bool:
    """Say whether a device that the server sees may be leased by this process itself: it would wait for itself."""
    leased = watchdog.leased
    if not leased or not visible:
        return bool(leased) and visible is None
    named = visible.split(",")
    are_uuids = all(name in leased or name.startswith(("GPU-", "MIG-")) for name in named)
    return not are_uuids or not leased.isdisjoint(named)
