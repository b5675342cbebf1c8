"""Waits for many servers at once, in one thread of the test process."""

from __future__ import annotations

import contextlib
import os
import select
import time
from typing import TYPE_CHECKING

from harness import asynchronous, journal, procfs
from harness.errors import HarnessError, NotReady, ServerExited
from harness.readiness import Check

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from harness.readiness import Probe
    from harness.server import Server

# A connection that is refused costs 15 microseconds: this costs 0.5 % of a core for each server, however long it takes.
_POLL_S = 0.004
# A wrong answer costs the server work and a line in its log, and so may a user's check: ask more and more slowly.
_LONGEST_POLL_S = 0.1
_STATUS_S = 0.05
# How often a probe that waits for an answer is asked whether it has waited long enough.
_ANSWER_S = 0.02
# The longest wait in one request to the watchdog: one that has died is noticed at once anyway.
SLICE_S = 60.0


class _Callable:
    """A user's own check as a probe. It may block; nothing can be done about that here."""

    def __init__(self, server: Server, check: Callable[[Server], bool]) -> None:
        self._server = server
        self._check = check
        self.waits_for: int | None = None
        self.seen = "the check gave False"

    def step(self) -> bool:
        return bool(self._check(self._server))

    def close(self) -> None:
        """Nothing is held."""


class _Wait:
    """One server that is waited for."""

    def __init__(self, server: Server, limit_s: float, began: float) -> None:
        self.server = server
        self.limit_s = limit_s
        self.began = began
        self.deadline = began + limit_s
        self.probe = _probe(server)
        self.root = _pidfd(server)
        self.pause_s = _POLL_S
        self.next_step = began
        self.next_status = began
        server.readiness.begin(self.probe is not None, limit_s)

    def close(self) -> None:
        if self.probe is not None:
            self.probe.close()
        self.forget_root()

    def forget_root(self) -> None:
        """Stop watching the root: once it has exited its pidfd is readable for good."""
        if self.root is not None:
            os.close(self.root)
            self.root = None


def _probe(server: Server) -> Probe | None:
    check = server.ready
    if check is None:
        return None
    if isinstance(check, Check):
        return check.begin(server)
    return _Callable(server, check)


def _pidfd(server: Server) -> int | None:
    try:
        descriptor = os.pidfd_open(server.pid)
    except OSError:
        return None
    if procfs.is_alive(server.pid, server.start_time):
        return descriptor
    os.close(descriptor)
    return None


def wait_ready(servers: Sequence[Server], timeout_s: float | None) -> None:
    """Return when every server is ready; raise for the first that is not, fails or exits."""
    began = time.monotonic()
    waits = [_Wait(server, timeout_s or server.ready_timeout_s, began) for server in servers]
    word = journal.Wait(
        "ready", [wait.server.name for wait in waits], max((wait.limit_s for wait in waits), default=0.0)
    )
    try:
        while waits:
            asynchronous.check()
            if word.is_due:
                _say_what_is_awaited(word, waits)
            for wait in list(waits):
                if _is_done(wait, began):
                    wait.close()
                    waits.remove(wait)
            if waits:
                _sleep(waits)
    finally:
        for wait in waits:
            wait.close()
        word.end()


def _say_what_is_awaited(word: journal.Wait, waits: list[_Wait]) -> None:
    server, probe = waits[0].server, waits[0].probe
    awaited = f"{_described(server.ready)}: {probe.seen}" if probe is not None else ""
    word.say(awaited, server.log_path, [wait.server.name for wait in waits])


def _described(check: object) -> str:
    """Name a check for reports that are kept and shown to others: a query, or a user's own arguments, may be secret."""
    if isinstance(check, Check):
        return repr(check).partition("?")[0]
    return str(getattr(getattr(check, "func", check), "__qualname__", type(check).__qualname__))


def _is_done(wait: _Wait, began: float) -> bool:
    now = time.monotonic()
    if now >= wait.next_status or _has_exited(wait.root):
        _check_alive(wait, now - began)
        wait.next_status = now + _STATUS_S
    if wait.probe is None:
        _note_ready(wait)
        return True
    is_due = now >= wait.next_step or wait.probe.waits_for is not None
    if is_due and _step(wait, wait.probe, now - began):
        _check_alive(wait, now - began)
        _note_ready(wait)
        return True
    wait.server.readiness.see(wait.probe.seen)
    if now >= wait.deadline:
        raise _not_ready(
            wait, f"was not ready after {wait.limit_s:g} s, waiting for {wait.server.ready!r}: {wait.probe.seen}"
        )
    return False


def _note_ready(wait: _Wait) -> None:
    server = wait.server
    if server.readiness.end("ready"):
        server.note("ready", seconds=round(time.monotonic() - server.launched_at, 6))


def _step(wait: _Wait, probe: Probe, waited_s: float) -> bool:
    was_asked = probe.waits_for is not None
    try:
        is_ready = probe.step()
    except Exception as error:
        asynchronous.check()  # who was not waited for any more is not stopped
        what = f"failed its readiness check {wait.server.ready!r} after {waited_s:.2f} s: "
        why = error.message if isinstance(error, HarnessError) else repr(error)
        failure = _not_ready(wait, what + why, reason=what + type(error).__name__)
        with contextlib.suppress(HarnessError):
            wait.server.stop()
        raise failure from error
    if probe.waits_for is None:
        # Refused connections are cheap; an answer that was not the right one is not, nor is a user's own check.
        is_dear = was_asked or isinstance(probe, _Callable)
        wait.pause_s = min(wait.pause_s * 1.5, _LONGEST_POLL_S) if is_dear else _POLL_S
        wait.next_step = time.monotonic() + wait.pause_s
    return is_ready


def _has_exited(root: int | None) -> bool:
    if root is None:
        return False
    poll = select.poll()
    poll.register(root, select.POLLIN)
    return bool(poll.poll(0))


def _check_alive(wait: _Wait, waited_s: float) -> None:
    status = wait.server.status()
    # A root that exits with 0 and leaves processes is a daemon; one that fails is a crash, whatever it left.
    if status.root_exited:
        wait.forget_root()
    if status.phase != "gone" and not (status.root_exited and status.returncode != 0):
        return
    server = wait.server
    what = f" while it was waited for ({server.ready!r})" if server.ready is not None else ""
    text = f"{server.name!r} (pid {server.pid}) ended with {server.describe_exit()} after {waited_s:.2f} s{what}"
    returncode = server.returncode
    _note_not_ready(wait, f"it ended with {server.describe_exit()}")
    server.stop()
    raise ServerExited(text, server=server.name, returncode=returncode, log_tail=server.log_tail())


def _note_not_ready(wait: _Wait, text: str, reason: str = "") -> None:
    server = wait.server
    server.readiness.end(text)
    seconds = round(time.monotonic() - wait.began, 6)
    shown = (reason or text).replace(repr(server.ready), _described(server.ready))
    server.note("not_ready", seconds=seconds, reason=shown)


def _not_ready(wait: _Wait, text: str, reason: str = "") -> NotReady:
    server = wait.server
    _note_not_ready(wait, text, reason)
    return NotReady(f"{server.name!r} (pid {server.pid}) {text}", server=server.name, log_tail=server.log_tail())


def _sleep(waits: list[_Wait]) -> None:
    poll = select.poll()
    for wait in waits:
        if wait.root is not None:
            poll.register(wait.root, select.POLLIN)
        if wait.probe is not None and wait.probe.waits_for is not None:
            poll.register(wait.probe.waits_for, select.POLLIN)
            wait.next_step = time.monotonic() + _ANSWER_S
    times = [wait.next_status for wait in waits] + [wait.deadline for wait in waits]
    times += [wait.next_step for wait in waits]
    poll.poll(max(0.0, min(times) - time.monotonic()) * 1000)
