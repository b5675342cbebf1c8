"""The async forms: what would block runs in a thread of its own, and ends soon when its task is cancelled.

A cancellation is to the thread what Ctrl-C is to the main thread: where it waits it calls `check`, which raises once.
So what an interrupt may not lose, a cancellation does not lose either. It is raised in the task only when the thread
has ended. A pool of threads would not do: as many waits as it has threads would hold up the stop that ends them.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# How long a thread that may be given up waits before it looks again: a cancellation takes that long.
_LOOK_S = 0.05
# How long a cancellation waits for a user's own readiness check, which may block for ever.
CHECK_S = 1.0

_here = threading.local()


class GivenUp(BaseException):
    """The task that awaits this thread was cancelled. Like KeyboardInterrupt, it is no Exception."""


def check() -> None:
    """Raise GivenUp, once, if this thread works for a task that has been cancelled."""
    call: _Call[Any] | None = getattr(_here, "call", None)
    if call is not None and call.is_given_up:
        _here.call = None
        raise GivenUp


def slice_s(longest_s: float) -> float:
    """Give how long this thread may wait until it must call `check` again: `longest_s` where it works for no task."""
    return min(longest_s, _LOOK_S) if getattr(_here, "call", None) is not None else longest_s


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """Raise no GivenUp in here, but at the next `check` after it: for what must be followed by something else."""
    call: _Call[Any] | None = getattr(_here, "call", None)
    _here.call = None
    try:
        yield
    finally:
        _here.call = call


class _Call(Generic[_Result]):
    """A call in a thread of its own."""

    def __init__(self, function: Callable[[], _Result], undo: Callable[[_Result], object] | None = None) -> None:
        self._function = function
        self._undo = undo
        self._lock = threading.Lock()
        self._result: list[_Result] = []
        self._error: BaseException | None = None
        self._has_ended = False
        self.is_given_up = False

    def start(self, name: str, tell: Callable[[], None], *, may_be_given_up: bool) -> None:
        """Start the thread, which calls `tell` when it ends. It does not keep the interpreter from exiting."""
        threading.Thread(target=self._run, args=(tell, may_be_given_up), name=f"harness {name}", daemon=True).start()

    def _run(self, tell: Callable[[], None], may_be_given_up: bool) -> None:  # noqa: FBT001 - it is Thread's argument
        _here.call = self if may_be_given_up else None
        try:
            self._result.append(self._function())
        except BaseException as error:  # noqa: BLE001 - it is raised in the task
            self._error = error
        _here.call = None
        if self._end() is not None:
            self.undo()
        tell()

    def _end(self) -> Callable[[_Result], object] | None:
        with self._lock:
            self._has_ended = True
            return self._undo if self.is_given_up and self._result else None

    def give_up(self) -> bool:
        """Let the thread end soon and undo what it has done; where it has ended already, give True: call `undo`."""
        with self._lock:
            self.is_given_up = True
            return self._has_ended and bool(self._result) and self._undo is not None

    def undo(self) -> None:
        """Undo what was done for nobody; an error would have nobody to go to."""
        if self._undo is not None:
            with contextlib.suppress(Exception):
                self._undo(self._result[0])

    def result(self) -> _Result:
        """Give what the call returned, or raise what it raised."""
        __tracebackhide__ = True
        if self._error is None:
            return self._result[0]
        try:
            raise self._error
        finally:
            self._error = None  # it refers to this object by its traceback


class _Library(Protocol):
    """What is needed of the library that runs the task: an event that a thread can set."""

    def tell(self) -> None:
        """Set the event, in the thread."""

    async def wait(self) -> None:
        """Wait for the event, until the task is cancelled."""

    async def finish(self, limit_s: float) -> BaseException | None:
        """Wait for the event, cancelled or not; give the cancellation that came, if the library says it only once."""


class _Asyncio:
    def __init__(self) -> None:
        import asyncio  # noqa: PLC0415 - heavy, and loaded already where a loop runs

        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._cancelled = asyncio.CancelledError

    def tell(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        await self._event.wait()

    async def finish(self, limit_s: float) -> BaseException | None:
        last = None
        end = None if math.isinf(limit_s) else self._loop.call_later(limit_s, self._event.set)
        while not self._event.is_set():
            try:
                await self._event.wait()
            except self._cancelled as error:  # noqa: PERF203 - once for each cancellation
                last = error
        if end is not None:
            end.cancel()
        return last


class _Trio:
    def __init__(self) -> None:
        import trio  # noqa: PLC0415 - as above

        self._scope = trio.CancelScope
        self._now = trio.current_time
        self._token = trio.lowlevel.current_trio_token()
        self._event = trio.Event()

    def tell(self) -> None:
        with contextlib.suppress(RuntimeError):  # the run has ended: nobody waits
            self._token.run_sync_soon(self._event.set)

    async def wait(self) -> None:
        await self._event.wait()

    async def finish(self, limit_s: float) -> BaseException | None:
        with self._scope(shield=True, deadline=self._now() + limit_s):
            await self._event.wait()
        return None  # trio says it again at the next checkpoint


def _library() -> _Library:
    try:
        import sniffio  # noqa: PLC0415 - only trio's users have it
    except ImportError:
        return _Asyncio()
    try:
        is_trio = sniffio.current_async_library() == "trio"
    except sniffio.AsyncLibraryNotFoundError:
        is_trio = False
    return _Trio() if is_trio else _Asyncio()


async def _run(name: str, call: _Call[_Result], limit_s: float) -> _Result:
    __tracebackhide__ = True
    library = _library()
    call.start(name, library.tell, may_be_given_up=True)
    try:
        await library.wait()
    except GeneratorExit:
        # The loop has dropped the task: nothing can be awaited any more.
        if call.give_up():
            threading.Thread(target=call.undo, daemon=True).start()
        raise
    except BaseException:
        is_late = call.give_up()
        await library.finish(limit_s)
        if is_late:
            await _finish(f"undo {name}", _Call(call.undo))
        raise
    return call.result()


async def _finish(name: str, call: _Call[_Result]) -> _Result:
    """Run a call to its end, cancelled or not; its own error is raised rather than the cancellation."""
    __tracebackhide__ = True
    library = _library()
    call.start(name, library.tell, may_be_given_up=False)
    cancelled = await library.finish(math.inf)
    result = call.result()
    if cancelled is not None:
        raise cancelled
    return result


def form_of(
    sync: Callable[_Arguments, _Result],
    *,
    undo: Callable[[_Result], object] | None = None,
    limit_s: float = math.inf,
) -> Callable[_Arguments, Coroutine[Any, Any, _Result]]:
    """Make the async form of a method. `undo` is for a result that comes as the task is cancelled: nobody will hold it.

    A cancellation waits at most `limit_s` for the thread to end.
    """

    @functools.wraps(sync)
    async def form(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        __tracebackhide__ = True
        call = _Call(functools.partial(sync, *args, **kwargs), undo)
        del args, kwargs  # they may hold values of an environment, which no traceback may show
        return await _run(sync.__name__, call, limit_s)

    form.__name__ += "_async"
    form.__qualname__ += "_async"
    form.__doc__ = f'Do what `{sync.__name__}` does, in a thread: the event loop goes on. See the README, "Async".'
    return form


def uncancellable(sync: Callable[_Arguments, _Result]) -> Callable[_Arguments, Coroutine[Any, Any, _Result]]:
    """Make the async form of a method that runs to its end also in a task that is cancelled."""

    @functools.wraps(sync)
    async def form(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        __tracebackhide__ = True
        return await _finish(sync.__name__, _Call(functools.partial(sync, *args, **kwargs)))

    form.__name__ = form.__qualname__ = sync.__name__.replace("__", "__a", 1)
    return form
