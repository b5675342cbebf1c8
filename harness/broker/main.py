"""The loop of the broker process: orders from the watchdog, readings, ends of keepers, time."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, TypedDict

from harness import messages, procfs
from harness.broker.book import Who
from harness.broker.edits import Edits
from harness.broker.readers import Opened, Readers
from harness.broker.store import Store
from harness.broker.tenants import NOBODY_WAITS_S, Tenants
from harness.broker.waits import Waits
from harness.lease_messages import (
    ClientGoneOrder,
    EndLeaseOrder,
    LeaseOrder,
    LeaseStatus,
    TenantAsked,
    TenantGone,
    TenantOrder,
    TenantStarted,
)
from harness.watchdog import kernel
from harness.watchdog.log import Log

if TYPE_CHECKING:
    from typing import NoReturn

    from harness.messages import BrokerReport, Message

_MESSAGE_BYTES = 1 << 18
# A reading wakes the main thread, which must not wait for the interpreter's usual 5 ms.
_SWITCH_S = 0.0005
_MOST_CHARACTERS = 8000


class Config(TypedDict):
    """What the watchdog gives: a descriptor of the socket to it, its pid, the store's directory, paths of libraries."""

    socket: int
    watchdog: int
    store: str
    is_shared: bool
    paths: list[str]
    log: str


def main(config: Config) -> NoReturn:
    """Read devices and hold leases until the watchdog has gone and all memory is back, or given up."""
    log = Log(config["log"])
    try:
        os.setsid()
        kernel.signal_at_parent_death(signal.SIGCONT)  # were it stopped, it must see the watchdog's end
        kernel.set_name("harness-broker")
        sys.setswitchinterval(_SWITCH_S)
        _Broker(config, log).run()
    except BaseException as error:  # noqa: BLE001 - whatever it is: the next broker judges what this one leaves
        log.mistake(error)
        log.write(f"the broker ends: {error}")
    os._exit(1)


class _Broker:
    def __init__(self, config: Config, log: Log) -> None:
        self._log = log
        self._socket = socket.socket(fileno=config["socket"])
        self._socket.set_inheritable(False)
        self._has_watchdog = os.getppid() == config["watchdog"]
        self._unsent: list[bytes] = []
        self._give_up_at: float | None = None
        found = procfs.stat(os.getpid())
        me = Who(os.getpid(), found.start_time if found is not None else 0, os.stat("/proc/self/ns/pid").st_ino)
        self._readers = Readers()
        self._edits = Edits(Store(config["store"], is_shared=config["is_shared"]), _boot_id(), log)
        self._tenants = Tenants(self._edits, self._readers, me, log, self._report)
        self._waits = Waits(self._edits, self._readers, me, log, report=self._report, granted=self._tenants.granted)

    def run(self) -> NoReturn:
        while True:
            self._wait()
            self._read_orders()
            for news in self._readers.take():
                if isinstance(news, Opened):
                    self._tenants.know(news.devices)
                    self._waits.opened(news)
                else:
                    self._tenants.read(news)
                    self._waits.read(news)
            self._waits.look()
            self._tenants.see_time()
            if self._edits.deadline is not None and self._edits.deadline <= time.monotonic():
                self._edits.flush()
            if not self._has_watchdog and self._tenants.is_idle and self._is_done():
                os._exit(0)

    def _is_done(self) -> bool:
        # A store that cannot be changed would keep this process for good. What it says is judged by whoever asks next.
        now = time.monotonic()
        self._give_up_at = now + NOBODY_WAITS_S if self._give_up_at is None else self._give_up_at
        return self._edits.is_idle or now >= self._give_up_at

    def _wait(self) -> None:
        poll = select.poll()
        if self._has_watchdog:
            poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        poll.register(self._readers.descriptor, select.POLLIN)
        keepers = self._tenants.keepers() if not self._has_watchdog else {}
        for keeper in keepers:
            poll.register(keeper, select.POLLIN)
        for descriptor, _ in poll.poll(self._timeout_ms()):
            if descriptor in keepers:
                self._tenants.keeper_ended(keepers[descriptor])

    def _timeout_ms(self) -> float | None:
        pauses = [self._waits.pause_s(), self._tenants.pause_s()]
        if self._edits.deadline is not None:
            pauses.append(max(0.0, self._edits.deadline - time.monotonic()))
        due = [pause for pause in pauses if pause is not None]
        return min(due) * 1000 if due else None

    def _read_orders(self) -> None:
        self._flush()
        while self._has_watchdog:
            try:
                data = self._socket.recv(_MESSAGE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._has_watchdog = False
                self._waits.clear()
                self._tenants.watchdog_gone()
                return
            self._obey(messages.unpack(data))

    def _obey(self, order: Message) -> None:
        if isinstance(order, LeaseOrder):
            self._waits.add(order.lease, order.request)
        elif isinstance(order, EndLeaseOrder):
            if not self._waits.end(order.lease):
                self._tenants.end(order.lease)
        elif isinstance(order, TenantOrder):
            self._tenants.add(order)
        elif isinstance(order, TenantStarted):
            self._tenants.started(order)
        elif isinstance(order, TenantAsked):
            self._tenants.asked(order.key)
        elif isinstance(order, TenantGone):
            self._tenants.gone(order.key, is_stuck=order.is_stuck)
        elif isinstance(order, ClientGoneOrder):
            self._waits.clear()
            self._tenants.client_gone()

    def _report(self, report: BrokerReport | LeaseStatus) -> None:
        if isinstance(report, LeaseStatus) and report.state == "waiting" and self._unsent:
            return  # the watchdog is stopped: it hears later what is waited for then
        self._unsent.append(messages.pack(_cut(report)))
        self._flush()

    def _flush(self) -> None:
        while self._unsent and self._has_watchdog:
            try:
                self._socket.send(self._unsent[0], socket.MSG_DONTWAIT)
            except BlockingIOError:
                return  # the watchdog is stopped; this goes on
            except OSError:
                return  # it has died, which the next read says
            del self._unsent[0]


def _cut(report: BrokerReport | LeaseStatus) -> BrokerReport | LeaseStatus:
    # A message that is too long would keep all that follow from being sent.
    if isinstance(report, LeaseStatus) and len(report.text) > _MOST_CHARACTERS:
        return report.replaced(text=f"{report.text[:_MOST_CHARACTERS]} ...")
    return report


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
