"""The client's hold on one watchdog: forks it, sends it requests, knows when it has died, and ends it.

The fork is multiprocessing's; the child then executes `watchdog/boot.py`. Between the two, `_become_watchdog` is the
only code that runs in the watchdog process without living in `watchdog/`: it is still the test process's image.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import multiprocessing.process
import multiprocessing.util
import os
import select
import signal
import sys
import threading
import time
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

import harness.errors
from harness import frames, messages, platform, procfs, signals
from harness.channel import Channel, ChannelClosed, NoReply
from harness.errors import HarnessError, WatchdogDied

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess

_BOOT = Path(__file__).with_name("watchdog") / "boot.py"
# Round trips take 0.1 ms; a watchdog that is silent for this long is stopped or hung.
ANSWER_S = 30.0
# After its last deadline, how long the watchdog may take to kill, report and end.
END_S = 8.0
_KEEPERS_POLL_S = 0.01

_links: weakref.WeakSet[Link] = weakref.WeakSet()
_Reply = TypeVar("_Reply", bound=messages.Reply)


class Link:
    """One running watchdog, seen from the test process."""

    def __init__(self, log_path: Path, *, crash_grace_s: float, controller: int | None = None) -> None:
        """Fork the watchdog; raises PlatformNotSupported or HarnessError if that cannot be done here."""
        platform.check()
        self._owner = os.getpid()
        self._crash_grace_s = crash_grace_s
        self.is_closed = False
        self._has_launched = False
        self.report: messages.Stopped | None = None
        self._closing = threading.Lock()
        self._keepers: dict[int, int] = {}
        config: dict[str, object] = {
            "client": os.getpid(),
            "controller": controller,
            "crash_grace_s": crash_grace_s,
            "log": str(log_path),
        }
        self._process, descriptor = _fork(config)
        self._channel = Channel(descriptor)
        self.pid = self._process.pid or 0
        self._pidfd = os.pidfd_open(self.pid)
        _links.add(self)
        # Runs before multiprocessing ends its daemon processes at exit, and in pytest-xdist's workers as well.
        self._at_exit = multiprocessing.util.Finalize(None, self.close, exitpriority=100)

    @property
    def is_alive(self) -> bool:
        """Say whether the watchdog runs."""
        return not self.is_closed and self._owner == os.getpid() and not self._has_ended(0)

    @property
    def pidfd(self) -> int:
        """Give a descriptor that is readable once the watchdog has ended."""
        return self._pidfd

    def request(self, request: messages.Request, reply: type[_Reply], *, timeout_s: float = 0.0) -> _Reply:
        """Send a request; `timeout_s` is how long it may take by its nature. Raises what the watchdog replies."""
        self._check_usable()
        return self._exchange(self._channel.new_id(), request, reply, timeout_s)

    def launch(self, request: messages.Launch | messages.Adopt) -> messages.Launched:
        """Have a server launched or adopted; if that is interrupted, the server is killed before this raises."""
        self._check_usable()
        self._has_launched = True
        key = self._channel.new_id()
        try:
            launched = self._exchange(key, request, messages.Launched, 0.0)
        except HarnessError:
            raise
        except BaseException:
            # Ctrl-C, or pytest-timeout's SIGALRM: nobody will ever hold this server.
            with contextlib.suppress(HarnessError):
                self.request(messages.Stop([key], None, kill=True), messages.Stopped)
            raise
        self._remember_keeper(launched.keeper)
        return launched

    def _remember_keeper(self, pid: int) -> None:
        keeper = procfs.stat(pid) if pid else None
        if keeper is not None:
            self._keepers[pid] = keeper.start_time

    def _exchange(self, key: int, request: messages.Request, reply: type[_Reply], timeout_s: float) -> _Reply:
        try:
            answer = messages.decode(self._channel.request(key, messages.encode(request), timeout_s + ANSWER_S))
        except ChannelClosed:
            raise self._died() from None
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
        if self._owner != os.getpid():
            raise HarnessError(
                f"this watchdog belongs to process {self._owner}: a forked child cannot use it, start one of its own"
            )
        if self.is_closed:
            raise HarnessError("this watchdog has been closed")

    def _died(self) -> WatchdogDied:
        self._has_ended(1.0)
        status = "" if self._process.exitcode is None else f" ({signals.describe(self._process.exitcode)})"
        words = self._channel.last_words()
        answer = messages.decode(words) if words else None
        reason = f": {answer.message}" if isinstance(answer, messages.Failed) else ""
        return WatchdogDied(f"the watchdog (pid {self.pid}) has died{status}{reason}; its keepers stop its servers")

    def _has_ended(self, timeout_s: float) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def close(self) -> None:
        """Stop every server, end the watchdog and reap it. Safe to call twice, from any thread, and after a crash."""
        if self._owner != os.getpid():
            return
        with self._closing:
            if self.is_closed:
                return
            try:
                if self._has_launched:
                    self.report = self._exchange(
                        self._channel.new_id(), messages.Close(), messages.Stopped, self._longest_stop_s()
                    )
                else:
                    self._kill()
            except WatchdogDied:
                self._wait_for_keepers()
                raise
            finally:
                self._end()

    def _wait_for_keepers(self) -> None:
        # Without a watchdog its keepers stop its servers; what comes after `close` may need their ports.
        deadline = time.monotonic() + self._crash_grace_s + END_S
        while any(procfs.is_alive(pid, start) for pid, start in self._keepers.items()) and time.monotonic() < deadline:
            time.sleep(_KEEPERS_POLL_S)

    def _longest_stop_s(self) -> float:
        return self.longest_grace_s + END_S

    longest_grace_s = 0.0

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _end(self) -> None:
        self._at_exit.cancel()
        self._channel.close()
        # A watchdog that hangs is ended: its keepers notice, and stop its servers.
        if not self._has_ended(self._crash_grace_s + END_S):
            self._kill()
        self._process.join()
        self.is_closed = True
        os.close(self._pidfd)

    def forget_in_child(self) -> None:
        """In a forked child: let go of the Pipe, and keep multiprocessing from ending the watchdog when it exits."""
        self._channel.close()
        os.close(self._pidfd)
        # At its exit a child that was made by os.fork sends SIGTERM to every daemon process of its parent that is in
        # here, and there is no public way out.
        multiprocessing.process._children.discard(self._process)  # type: ignore[attr-defined]  # noqa: SLF001


def _forget_links() -> None:
    for link in list(_links):
        if not link.is_closed:
            link.forget_in_child()


os.register_at_fork(after_in_child=_forget_links)


def _fork(config: dict[str, object]) -> tuple[ForkProcess, int]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    arguments = (theirs.fileno(), config)
    process = context.Process(target=_become_watchdog, args=arguments, name="harness-watchdog", daemon=True)
    # Until the child has let go of this process's handlers, a Ctrl-C would run them in it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of every fork in a process with threads (a pytest-xdist worker has some): a lock that
            # one of them holds stays locked in the child. This child takes none: it executes another program.
            warnings.filterwarnings("ignore", message=".*multi-threaded", category=DeprecationWarning)
            process.start()
        return process, os.dup(ours.fileno())
    except (OSError, AssertionError) as error:
        raise HarnessError(f"cannot fork the watchdog: {error}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        ours.close()
        theirs.close()


def _become_watchdog(pipe: int, config: dict[str, object]) -> NoReturn:
    """Run in the forked child: keep nothing of the test process, and execute the watchdog's program."""
    try:
        os.setsid()
        pipe = fcntl.fcntl(pipe, fcntl.F_DUPFD, 3)
        _close_all_but(pipe)
        _reset_signals()
        program = [sys.executable, *_flags(), str(_BOOT), json.dumps({"pipe": pipe, **config})]
        os.execv(program[0], program)  # noqa: S606 - no shell is wanted
    except BaseException as error:  # noqa: BLE001 - whatever it is, this child must end here and say why
        words = messages.Failed("WatchdogDied", f"cannot execute {sys.executable}: {error}")
        for frame in frames.split(0, messages.encode(words)):
            os.write(pipe, frame)
    os._exit(127)


def _flags() -> list[str]:
    # -S skips site: no .pth file of the test process's environment runs, and it starts in half the time. Coverage
    # measures other processes by a .pth file of its own.
    is_measured = "COVERAGE_PROCESS_START" in os.environ or "COVERAGE_PROCESS_CONFIG" in os.environ
    flags = ["-I"] if is_measured else ["-I", "-S"]
    # Names and texts must be encoded as the test process decoded them.
    return [*flags, "-X", f"utf8={sys.flags.utf8_mode}"]


def _close_all_but(kept: int) -> None:
    # A descriptor left open here keeps `pytest | cat` from ending and xdist from seeing a dead worker, and, if it is
    # one of /dev/nvidia*, keeps a dead test process's GPU memory allocated.
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != kept:  # noqa: PLR2004 - 0, 1 and 2 are the standard streams
            with contextlib.suppress(OSError):
                os.close(int(name))


def _reset_signals() -> None:
    # execve resets handlers, but keeps what is ignored and what is blocked.
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):
            if signal.getsignal(number) is not None:
                signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
