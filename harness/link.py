"""The client's hold on one watchdog: sends it requests, knows when it has died, and closes it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import weakref
from typing import TYPE_CHECKING, TypeVar

import harness.errors
from harness import messages, procfs, signals
from harness.channel import Channel, ChannelClosed, NoReply
from harness.errors import HarnessError, SpecError, WatchdogDied
from harness.frames import FrameError

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.forking import WatchdogProcess
    from harness.lease_messages import Lease

# Round trips take 0.1 ms; a watchdog that is silent for this long is stopped or hung.
ANSWER_S = 30.0
# After its last deadline, how long the watchdog may take to kill, report and end.
END_S = 8.0
_KEEPERS_POLL_S = 0.01

_links: weakref.WeakSet[Link] = weakref.WeakSet()
_Reply = TypeVar("_Reply", bound=messages.Reply)


class Link:
    """One running watchdog, seen from the test process."""

    def __init__(self, process: WatchdogProcess) -> None:
        """Take the watchdog process; from now on the link closes it, also at this process's exit."""
        self._process = process
        self.is_closed = False
        self._is_shut = False
        self.longest_grace_s = 0.0
        self.memory_s = 0.0
        self.report: messages.Stopped | None = None
        self._has_launched = False
        self._closing = threading.RLock()  # a signal handler may close while this thread does
        self._keepers: dict[int, int] = {}
        self._channel = Channel(process.take_descriptor())
        process.close = self.close
        _links.add(self)

    @property
    def pid(self) -> int:
        """Give the watchdog's pid."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Say whether the watchdog runs, and belongs to this process."""
        return not self.is_closed and self._process.owner == os.getpid() and not self._process.has_ended()

    def request(
        self,
        request: messages.Request,
        reply: type[_Reply],
        *,
        timeout_s: float = 0.0,
        meanwhile: Callable[[], None] | None = None,
    ) -> _Reply:
        """Send a request; `timeout_s` is how long it may take by its nature. Raises what the watchdog replies.

        `meanwhile` is called about once in a second until the reply is there.
        """
        __tracebackhide__ = True
        self._check_usable()
        return self._exchange(self._channel.new_id(), request, reply, timeout_s, meanwhile)

    def new_key(self) -> int:
        """Give the key of a server that is to be launched."""
        return self._channel.new_id()

    def launch(self, key: int, request: messages.Launch | messages.Adopt) -> messages.Launched:
        """Have a server launched or adopted."""
        self._check_usable()
        self._has_launched = True
        launched = self._exchange(key, request, messages.Launched, 0.0)
        self._remember_keeper(launched.keeper)
        return launched

    def lease(self, number: int, request: Lease) -> None:
        """Ask for a lease; how it is with it, WaitLease tells."""
        self._check_usable()
        self._has_launched = True
        self._exchange(number, request, messages.Done, 0.0)

    def abandon(self, key: int) -> messages.Stopped | None:
        """Kill a server whose launch was interrupted, wherever that was; give how it ended, None if nobody knows."""
        try:
            return self.request(messages.Stop([key], None, kill=True), messages.Stopped)
        except HarnessError:
            return None

    def _remember_keeper(self, pid: int) -> None:
        keeper = procfs.stat(pid) if pid else None
        if keeper is not None:
            self._keepers[pid] = keeper.start_time

    def _exchange(
        self,
        key: int,
        request: messages.Request,
        reply: type[_Reply],
        timeout_s: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> _Reply:
        __tracebackhide__ = True  # the request holds the environment, which a traceback must not show
        try:
            limit_s = timeout_s + ANSWER_S
            answer = messages.decode(self._channel.request(key, messages.encode(request), limit_s, meanwhile))
        except FrameError as error:
            raise SpecError(f"the command and the environment are too large: {error}") from None
        except ChannelClosed:
            raise self._closed() if self._is_shut else self._died() from None
        except NoReply:
            silence = f"has not answered for {timeout_s + ANSWER_S:.0f} s: it hangs or is stopped"
            raise WatchdogDied(f"the watchdog (pid {self.pid}) {silence}") from None
        if isinstance(answer, messages.Failed):
            kind = getattr(harness.errors, answer.error, HarnessError)
            raise kind(answer.message)
        if not isinstance(answer, reply):
            raise HarnessError(f"the watchdog replied {type(answer).__name__} to {type(request).__name__}")
        return answer

    def _check_usable(self) -> None:
        owner = self._process.owner
        if owner != os.getpid():
            raise HarnessError(
                f"this watchdog belongs to process {owner}: a forked child cannot use it, start one of its own"
            )
        if self.is_closed:
            raise self._closed()

    @staticmethod
    def _closed() -> HarnessError:
        return HarnessError("this watchdog has been closed")

    def _died(self) -> WatchdogDied:
        self._process.has_ended(1.0)
        status = "" if self._process.exitcode is None else f" ({signals.describe(self._process.exitcode)})"
        words = self._channel.last_words()
        answer = messages.decode(words) if words else None
        reason = f": {answer.message}" if isinstance(answer, messages.Failed) else ""
        return WatchdogDied(f"the watchdog (pid {self.pid}) has died{status}{reason}; its keepers stop its servers")

    def close(self) -> None:
        """Stop every server, end the watchdog and reap it. Safe to call twice, from any thread, and after a crash.

        Raises WatchdogDied if the watchdog has died, once its keepers have done its work.
        """
        if self._process.owner != os.getpid():
            return
        with self._closing:
            if self.is_closed:
                return
            try:
                if self._has_launched:
                    self._close()
            finally:
                self._is_shut = True  # other threads' requests end by that, and the watchdog has not died
                self._channel.close()
                try:
                    # With servers it has its time to end by itself.
                    self._process.end(self._process.crash_grace_s + END_S if self._has_launched else 0.0)
                finally:
                    self.is_closed = True

    def _close(self) -> None:
        limit_s = self.longest_grace_s + self.memory_s + END_S
        try:
            self.report = self._exchange(self._channel.new_id(), messages.Close(), messages.Stopped, limit_s)
        except HarnessError as error:
            if self.is_closed:
                return  # by a signal handler, in the meantime
            if isinstance(error, WatchdogDied):
                # One that hangs is killed: only then do its keepers act.
                self._process.end()
                self._wait_for_keepers()
            raise

    def _wait_for_keepers(self) -> None:
        # Without a watchdog its keepers stop its servers; what comes after `close` may need their ports.
        deadline = time.monotonic() + self._process.crash_grace_s + END_S
        while (alive := [*filter(self.keeper_is_alive, self._keepers)]) and time.monotonic() < deadline:
            for pid in alive:
                self._continue(pid)
            time.sleep(_KEEPERS_POLL_S)

    def _continue(self, pid: int) -> None:
        """Continue a keeper that is stopped: the watchdog's end wakes it only if it was stopped before that."""
        found = procfs.stat(pid)
        if found is None or found.state != "T":
            return
        with contextlib.suppress(OSError):  # it has ended meanwhile
            keeper = os.pidfd_open(pid)
            try:
                if self.keeper_is_alive(pid):
                    signal.pidfd_send_signal(keeper, signal.SIGCONT)
            finally:
                os.close(keeper)

    def keeper_is_alive(self, pid: int) -> bool:
        """Say whether a keeper that launched a server runs: exactly that process, not another with its number."""
        return procfs.is_alive(pid, self._keepers.get(pid, -1))

    def forget_in_child(self) -> None:
        """In a forked child: let go of the Pipe, so that the watchdog sees its test process's end."""
        self._channel.close()


def _forget_links() -> None:
    for link in list(_links):
        link.forget_in_child()


if hasattr(os, "register_at_fork"):  # elsewhere nothing can be forked, nor a watchdog started
    os.register_at_fork(after_in_child=_forget_links)
