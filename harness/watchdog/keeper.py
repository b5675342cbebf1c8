"""A keeper: the process that is the parent, and the subreaper, of one server's tree.

`run` is called in a child that the watchdog has just forked. It carries out what `KeeperRules` decides. waitpid
answering ECHILD is the kernel's own statement that nothing of the server survives: no scan, no pid reuse, no marks.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
import time

from harness import messages, procfs
from harness.messages import Launch, Unkilled
from harness.watchdog import keeper_rules as rules
from harness.watchdog import kernel, limits, reaping, spawn, sweep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from harness.watchdog.ledger import Entry
    from harness.watchdog.log import Log

_MESSAGE_BYTES = 1 << 16
_INT = struct.Struct("i")
# poll(2) counts milliseconds in 31 bits, and Python raises OverflowError for more.
_LONGEST_POLL_S = 86400.0


def run(
    launch: Launch, control: socket.socket, watchdog: int, log: Log, entry: Entry, *, crash_grace_s: float
) -> NoReturn:
    """Keep one server until nothing of it is left. SIGTERM is blocked when this is called."""
    try:
        _isolate({control.fileno(), entry.descriptor})
        entry.log = log.reopened()
        if os.getppid() != watchdog:
            os._exit(0)  # the watchdog has died; nothing has been started yet
        _Keeper(launch, control, watchdog, log, entry, crash_grace_s=min(launch.grace_s, crash_grace_s)).run()
    except BaseException as error:  # noqa: BLE001 - whatever it is: the watchdog sweeps what a keeper leaves
        log.reopened().mistake(error)
    os._exit(1)


def _isolate(kept: set[int]) -> None:
    # Another keeper's socket, the Pipe to the test process or a held port in this process would outlive their owners.
    os.setsid()
    kernel.become_subreaper()
    kernel.signal_at_parent_death(signal.SIGCONT)  # a keeper that was stopped must see the watchdog's end
    signal.set_wakeup_fd(-1)
    kernel.close_all_but({0, 1, 2, *kept})
    limits.restore_descriptors()


def _wakeup() -> int:
    # SIGINT and SIGHUP are ignored, and SIGCHLD is handled, as in the watchdog.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    kernel.set_name("harness-keeper")
    return read_end


class _Keeper:
    def __init__(
        self, launch: Launch, control: socket.socket, watchdog: int, log: Log, entry: Entry, *, crash_grace_s: float
    ) -> None:
        self._launch = launch
        self._log = log
        self._entry = entry
        self._has_watchdog = True
        self._control = control
        self._rules = rules.KeeperRules(crash_grace_s=crash_grace_s)
        self._sweeper = sweep.Sweeper()
        self._asked: set[int] = set()
        self._reaper = reaping.Reaper()
        self._poll = select.poll()
        self._sources: dict[int, Callable[[], None]] = {}
        self._do: dict[type[rules.Effect], Callable[[], None]] = {
            rules.AskRoot: self._ask_root,
            rules.AskTop: self._ask_top,
            rules.KillTop: self._kill_top,
            rules.Sweep: self._sweep,
            rules.TellUnkilled: self._tell_unkilled,
            rules.Leave: _leave,
        }
        # The rest is done while the root executes its program.
        self._root = self._start()
        self._wakeup = _wakeup()
        self._watch(self._wakeup, self._reap)
        self._watch(control.fileno(), self._read_order)
        self._watch_watchdog(watchdog)

    def run(self) -> NoReturn:
        while True:
            for descriptor, _ in self._poll.poll(self._timeout_ms()):
                source = self._sources.get(descriptor)
                if source is not None:
                    source()
            if self._reaper.has_more:
                self._reap()
            if self._rules.deadline is not None and self._rules.deadline <= time.monotonic():
                self._handle(rules.Tick())

    def _timeout_ms(self) -> float | None:
        if self._reaper.has_more:
            return 0
        if self._rules.deadline is None:
            return None
        return min(max(0.0, self._rules.deadline - time.monotonic()), _LONGEST_POLL_S) * 1000 + 0.2

    def _watch(self, descriptor: int, source: Callable[[], None]) -> None:
        self._poll.register(descriptor, select.POLLIN)
        self._sources[descriptor] = source

    def _forget(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        del self._sources[descriptor]

    def _handle(self, event: rules.Event) -> None:
        for effect in self._rules.handle(event, time.monotonic()):
            if isinstance(effect, rules.Tell):
                self._tell(effect.report)
            else:
                self._do[type(effect)]()

    # ---- sources of events

    def _start(self) -> spawn.Root:
        try:
            if self._launch.lease is not None:
                self._wait_for_go()
            log = spawn.open_log(self._launch.log_path)
            root = spawn.fork_root(self._launch, log, self._entry, self._log)
        except OSError as error:
            self._handle(rules.RootDown(f"cannot {error.strerror}"))
            self._handle(rules.Reaped(None, is_empty=True, is_new=False))  # this ends the keeper
            raise
        # Before its root has started anything: until then it dies with this process.
        self._entry.note_root(os.getpid(), root.pid, log)
        os.close(log)
        self._watch(root.failure_pipe, self._see_start)
        return root

    def _wait_for_go(self) -> None:
        # Once the store of leases names this keeper its devices are given to nobody else, whatever is killed then.
        data = self._control.recv(_MESSAGE_BYTES)
        if not (data and isinstance(messages.unpack(data), messages.GoOrder)):
            raise OSError(errno.ECANCELED, "start it: it was stopped before its lease was recorded")

    def _watch_watchdog(self, watchdog: int) -> None:
        try:
            self._watch(os.pidfd_open(watchdog), self._lose_watchdog)
        except ProcessLookupError:
            self._lose_watchdog()
        if os.getppid() != watchdog:
            self._lose_watchdog()  # it died before its pidfd was opened

    def _see_start(self) -> None:
        root = self._root
        self._forget(root.failure_pipe)
        failure = spawn.read_failure(root)
        if failure is not None:
            self._handle(rules.RootDown(failure))
        else:
            self._handle(rules.RootUp(root.pid))
            os.close(root.pidfd)
        self._reap()

    def _read_order(self) -> None:
        try:
            data = self._control.recv(_MESSAGE_BYTES)
        except OSError:
            data = b""
        if not data:
            self._lose_watchdog()
            return
        order = messages.unpack(data)
        if isinstance(order, (messages.AskOrder, messages.KillOrder)):
            self._handle(rules.Ordered(order))

    def _lose_watchdog(self) -> None:
        for descriptor, source in list(self._sources.items()):
            if source in {self._lose_watchdog, self._read_order}:
                self._forget(descriptor)
        if self._has_watchdog:
            self._has_watchdog = False
            self._entry.note_members(procfs.descendants(os.getpid()))
        self._handle(rules.WatchdogGone())

    def _reap(self) -> None:
        _drain(self._wakeup)
        root = self._root
        if root.failure_pipe in self._sources:
            return  # whether the program was executed is told first
        returncode: int | None = None
        reaped: list[int] = []
        for pid, status in self._reaper.batch():
            reaped.append(pid)
            if pid == root.pid:
                returncode = os.waitstatus_to_exitcode(status)
        self._asked.difference_update(reaped)
        self._sweeper.forget(reaped)
        is_empty = self._reaper.has_no_child
        if reaped or is_empty:
            self._handle(rules.Reaped(returncode, is_empty, not is_empty and self._sweeper.has_new_top()))

    # ---- effects

    def _tell(self, report: messages.Report) -> None:
        if isinstance(report, (messages.TreeEmpty, messages.RootFailed)):
            self._entry.remove()
            if not self._has_watchdog:
                self._entry.remove_watchdogs_cgroup()
        try:
            if isinstance(report, messages.RootStarted):
                # With the number goes the process itself: the number may be given away before it is read.
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, _INT.pack(self._root.pidfd))
                self._control.sendmsg([messages.pack(report)], [rights])
            else:
                self._control.send(messages.pack(report))
        except OSError:
            return  # the watchdog has died; its pidfd says so as well

    def _ask_root(self) -> None:
        self._asked.add(self._root.pid)
        try:
            if self._launch.ask == "group":
                os.killpg(self._root.pid, signal.SIGTERM)
            else:
                os.kill(self._root.pid, signal.SIGTERM)
        except PermissionError:
            return  # a set-user-ID program of another user; the kill will report it

    def _ask_top(self) -> None:
        sweep.ask_tops(self._asked)

    def _kill_top(self) -> None:
        self._entry.kill()
        self._sweeper.kill_top()

    def _sweep(self) -> None:
        self._entry.kill()
        done = self._sweeper.sweep()
        self._handle(rules.Swept(done.is_new, len(done.alive)))

    def _tell_unkilled(self) -> None:
        self._tell(Unkilled(sweep.survivors()))


def _leave() -> NoReturn:
    os._exit(0)


def _drain(descriptor: int) -> None:
    try:
        os.read(descriptor, 4096)
    except BlockingIOError:
        return
