"""Forks the watchdog process, and ends it. Little is imported here: this runs in every pytest process.

The fork is multiprocessing's; the child then executes `watchdog/boot.py`. Between the two, `_become_watchdog` is the
only code that runs in the watchdog process without living in `watchdog/`: it is still the test process's image.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.popen_fork
import multiprocessing.process
import multiprocessing.util
import os
import select
import signal
import sys
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from harness import platform
from harness.errors import HarnessError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.context import ForkProcess

_BOOT = Path(__file__).with_name("watchdog") / "boot.py"

# What finds the interpreter and its libraries, and says how its texts and times are read; coverage's; and the mark of
# the server that this runs in, if it does.
_NEEDED = frozenset({"LANG", "PATH", "TZ", "HARNESS_SERVER"})
_NEEDED_BEGINNINGS = ("LC_", "LD_", "COVERAGE_", "COV_CORE_")

# poll(2) counts milliseconds in 31 bits, and Python raises OverflowError for more.
_LONGEST_POLL_S = 86400.0
# What the child says first, before any frame; it takes under 1 ms.
_UP = b"u"
_UP_LIMIT_S = 5.0
# In a process with threads a child may hang before that: on a lock that a thread held at the fork, in what Python and
# libraries run in every child (coverage does, in multiprocessing's). The next one is forked at another moment.
_TRIES = 2

_processes: weakref.WeakSet[WatchdogProcess] = weakref.WeakSet()


class WatchdogProcess:
    """One watchdog process, a child of this process."""

    def __init__(self, log_path: Path, *, crash_grace_s: float, controller: int | None = None) -> None:
        """Fork the watchdog; raises PlatformNotSupported or HarnessError if that cannot be done here."""
        platform.check()
        self.owner = os.getpid()
        self.crash_grace_s = crash_grace_s
        config: dict[str, object] = {
            "client": self.owner,
            "controller": controller,
            "crash_grace_s": crash_grace_s,
            "log": str(log_path),
            "cgroup": may_use_cgroups(),
        }
        self._process, self.descriptor = _fork(config)
        self.pid = self._process.pid or 0
        self._exitcode: int | None = None
        self._has_been_ended = False
        # Readable once the watchdog has ended; no reused pid can deceive.
        self.pidfd = os.pidfd_open(self.pid)
        self.close: Callable[[], None] = self.end
        """What ends this process in an orderly way; whoever launches servers through it sets another."""
        _processes.add(self)
        # Runs before multiprocessing ends its daemon processes at exit, and in pytest-xdist's workers as well.
        self._at_exit = multiprocessing.util.Finalize(None, self._close_at_exit, exitpriority=100)

    @property
    def exitcode(self) -> int | None:
        """Give its exit code, None while it runs (or if somebody else has reaped it)."""
        if self._exitcode is None and self.owner == os.getpid():
            self._exitcode = self._process.exitcode
        return self._exitcode

    def has_ended(self, timeout_s: float = 0.0) -> bool:
        """Say whether it has ended, waiting for that at most `timeout_s`."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(min(timeout_s, _LONGEST_POLL_S) * 1000))

    def _close_at_exit(self) -> None:
        try:
            self.close()
        except HarnessError as error:
            sys.stderr.write(f"harness: {error}\n")  # there is nobody left to raise it to

    def end(self, timeout_s: float = 0.0) -> None:
        """Give it a time to end by itself, kill it if it does not, and reap it."""
        if self._has_been_ended or self.owner != os.getpid():
            return
        try:
            self.has_ended(timeout_s)
        finally:
            # Also if a second Ctrl-C ends the wait: multiprocessing would wait for a hung watchdog without a bound.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            self._process.join()
            self._has_been_ended = True
            self._at_exit.cancel()
            self._exitcode = self._process.exitcode
            self._let_go()
            with contextlib.suppress(ValueError):
                self._process.close()  # refused if another has reaped it

    def take_descriptor(self) -> int:
        """Give the client's end of the Pipe away; the taker closes it."""
        descriptor, self.descriptor = self.descriptor, -1
        return descriptor

    def forget_in_child(self) -> None:
        """In a forked child: keep multiprocessing from ending the watchdog when the child exits."""
        self._let_go()

    def _let_go(self) -> None:
        _processes.discard(self)
        os.close(self.pidfd)
        if self.descriptor >= 0:
            os.close(self.take_descriptor())
        # At its exit a process sends SIGTERM to every daemon process that is in here: also a child that was made by
        # os.fork, to its parent's; also to one that was reaped by another. There is no public way out.
        multiprocessing.process._children.discard(self._process)  # type: ignore[attr-defined]  # noqa: SLF001


def may_use_cgroups() -> bool:
    """Say whether servers may get cgroups: HARNESS_CGROUP, "on" or "off"; raises HarnessError for anything else."""
    given = os.environ.get("HARNESS_CGROUP") or "on"
    if given not in {"on", "off"}:
        raise HarnessError(f'HARNESS_CGROUP must be "on" or "off", not {given!r}')
    return given == "on"


def _forget_processes() -> None:
    for process in list(_processes):
        process.forget_in_child()


def pids() -> list[int]:
    """Give the watchdog processes of this process."""
    return [process.pid for process in _processes if process.owner == os.getpid()]


if hasattr(os, "register_at_fork"):  # elsewhere nothing can be forked, nor a watchdog started
    os.register_at_fork(after_in_child=_forget_processes)


def _fork(config: dict[str, object]) -> tuple[ForkProcess, int]:
    for _ in range(_TRIES):
        found = _fork_once(config)
        if found is not None:
            return found
    why = f"the child was stopped, or has died, within {_UP_LIMIT_S:g} s of the fork"
    raise HarnessError(f"cannot fork the watchdog: {why}")


def _fork_once(config: dict[str, object]) -> tuple[ForkProcess, int] | None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    arguments = (theirs.fileno(), ours.fileno(), config)
    process = context.Process(target=_become_watchdog, args=arguments, name="harness-watchdog", daemon=True)
    # Until the child has let go of this process's handlers, a Ctrl-C would run them in it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of every fork in a process with threads (a pytest-xdist worker has some): a lock that
            # one of them holds stays locked in the child. This child takes none: it executes another program.
            warnings.filterwarnings("ignore", message=".*multi-threaded", category=DeprecationWarning)
            with _no_collection():
                process.start()
        return (process, os.dup(ours.fileno())) if _comes_up(process, ours.fileno()) else None
    except (OSError, AssertionError) as error:
        raise HarnessError(f"cannot fork the watchdog: {error}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        ours.close()
        theirs.close()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    # In the child it would run the destructors of the test process's objects, some of which take locks.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _comes_up(process: ForkProcess, pipe: int) -> bool:
    # Once it is up the child ends with this process whatever happens to either; before, nothing would wake it.
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    if poll.poll(_UP_LIMIT_S * 1000) and os.read(pipe, len(_UP)) == _UP:
        return True
    process.kill()
    process.join()
    with contextlib.suppress(ValueError):
        process.close()  # refused if another has reaped it
    return False


def _become_watchdog(pipe: int, clients_end: int, config: dict[str, object]) -> NoReturn:
    """Run in the forked child: keep nothing of the test process, and execute the watchdog's program."""
    try:
        import fcntl  # noqa: PLC0415 - not there on every platform that can import this module

        os.close(clients_end)
        _wake_at_end_of(pipe)
        os.write(pipe, _UP)
        os.setsid()
        pipe = fcntl.fcntl(pipe, fcntl.F_DUPFD, 3)
        _close_all_but(pipe)
        _reset_signals()
        program = [sys.executable, *_flags(), str(_BOOT), json.dumps({"pipe": pipe, **config})]
        os.execve(program[0], program, _environment())  # noqa: S606 - no shell is wanted
    except BaseException as error:  # noqa: BLE001 - whatever it is, this child must end here and say why
        from harness import frames, messages  # noqa: PLC0415 - needed here only

        words = messages.Failed("WatchdogDied", f"cannot execute {sys.executable}: {error}")
        for frame in frames.split(0, messages.encode(words)):
            os.write(pipe, frame)
    os._exit(127)


def _wake_at_end_of(pipe: int) -> None:
    # Until its program has set PR_SET_PDEATHSIG: were it stopped, the test process's end must wake it all the same.
    # The Pipe sends the signal then (F_SETSIG and O_ASYNC, fcntl(2)), which needs no import, and no time, unlike prctl.
    import fcntl  # noqa: PLC0415 - not there on every platform that can import this module

    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGCONT)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)


def _flags() -> list[str]:
    # -S skips site: no .pth file of the test process's environment runs, and it starts in half the time. Coverage
    # measures other processes by a .pth file of its own.
    is_measured = "COVERAGE_PROCESS_START" in os.environ or "COVERAGE_PROCESS_CONFIG" in os.environ
    flags = ["-I"] if is_measured else ["-I", "-S"]
    # Names and texts must be encoded as the test process decoded them.
    return [*flags, "-X", f"utf8={sys.flags.utf8_mode}"]


def _environment() -> dict[str, str]:
    """Give what the watchdog's interpreter needs, and nothing else: the test process's environment holds tokens."""
    return {name: os.environ[name] for name in os.environ if name in _NEEDED or name.startswith(_NEEDED_BEGINNINGS)}


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
