"""The async forms, with asyncio and with trio: the loop is not blocked, and a cancellation loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import random
import signal
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import processes
import pytest
from faults.runs import Watched
from servers.commands import READY_S, STUBBORN, family, member, web

import harness
from harness import procfs

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from anyio.abc import TaskGroup

    Check = Callable[[harness.Server], bool]
    Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]

# Each trial is cancelled at another instant of the few milliseconds that a launch takes.
TRIALS = 100
# So often the other task must have had its turn before it lets the one that is tested go on.
TURNS = 20
LONG_S = 480.0


@pytest.fixture(params=["asyncio", "trio"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run an async function to its end, with either library; afterwards no thread of an async form is left."""

    def run_with_library(function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        anyio.run(function, backend=request.param)
        wait_for_threads()

    return run_with_library


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("harness ")]


def wait_for_threads() -> None:
    """See that no thread is left: one that has told its task that it ends is still there for a moment."""
    processes.wait_for(lambda: threads() == [], 2.0, "the thread ends")


async def take_turns(then: Callable[[], object], is_due: Callable[[], bool] = lambda: True) -> None:
    """Do something, once this task has had its turns beside one that waits, and it is due."""
    for _ in range(TURNS):
        await anyio.sleep(0.002)  # each is a turn; how long it takes does not matter
    while not is_due():  # noqa: ASYNC110 - a check in a thread of its own tells no task
        await anyio.sleep(0.002)  # as above
    then()


async def beside(
    tested: Awaitable[object], then: Callable[[], object], is_due: Callable[[], bool] = lambda: True
) -> None:
    """Await what cannot end before `then` is called, which it never is if the event loop is blocked."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take_turns, then, is_due)
        await tested


async def cancelled_after_turns(
    function: Callable[[], Awaitable[object]], is_due: Callable[[], bool] = lambda: True
) -> None:
    """Await something in a scope that is cancelled while it waits; it must not end by itself."""
    with anyio.CancelScope() as scope:
        await beside(function(), scope.cancel, is_due)
        pytest.fail("it was not cancelled")
    assert scope.cancelled_caught


def sleeping(watchdog: harness.Watchdog) -> list[str]:
    lines = [procfs.command_line(pid) for pid in procfs.descendants(watchdog.pid or 0)]
    return [line for line in lines if line.startswith("sleep")]


# ---- the forms


@pytest.mark.parametrize(
    ("form", "sync"),
    [
        (harness.Watchdog.launch_async, harness.Watchdog.launch),
        (harness.ServerGroup.launch_async, harness.ServerGroup.launch),
        (harness.Server.wait_ready_async, harness.Server.wait_ready),
        (harness.ServerGroup.wait_ready_async, harness.ServerGroup.wait_ready),
        (harness.Server.wait_async, harness.Server.wait),
        (harness.Server.stop_async, harness.Server.stop),
        (harness.ServerGroup.stop_async, harness.ServerGroup.stop),
        (harness.Watchdog.stop_async, harness.Watchdog.stop),
    ],
)
def test_an_async_form_takes_what_the_sync_one_takes(form: Callable[..., object], sync: Callable[..., object]) -> None:
    assert inspect.signature(form) == inspect.signature(sync)
    assert inspect.iscoroutinefunction(form)
    assert form.__qualname__ == f"{sync.__qualname__}_async"


def test_every_form_does_what_the_sync_one_does(run: Run, watchdog: harness.Watchdog) -> None:
    async def use() -> None:
        async with watchdog.group("dp") as group:
            server = await group.launch_async(web(200), name="rank0", ready=harness.http_ok())
            assert await group.wait_ready_async(timeout_s=READY_S) is group
            other = await watchdog.launch_async(["sh", "-c", "exit 3"])
            assert (await other.wait_async(timeout_s=READY_S)).returncode == 3
            assert (await server.stop_async(grace_s=10.0)).how == "asked"
            assert (await watchdog.stop_async([server, other])).is_clean
            left = await group.launch_async(["sleep", "60"])
            assert (await group.stop_async(grace_s=10.0)).outcomes[1].how == "asked"
            async with await watchdog.launch_async(["sleep", "60"]) as last:
                assert last.is_alive
            assert left.state == last.state == "gone"

    run(use)


def test_errors_are_those_of_the_sync_forms(run: Run, watchdog: harness.Watchdog) -> None:
    async def use() -> None:
        with pytest.raises(harness.SpecError, match="grace_s"):
            await watchdog.launch_async(["sleep", "60"], grace_s=-1.0)
        with pytest.raises(harness.LaunchFailed, match="/no/such/program"):
            await watchdog.launch_async(["/no/such/program"])
        server = await watchdog.launch_async(["sleep", "60"], ready=lambda _: False)
        with pytest.raises(harness.NotReady, match="not ready after"):
            await server.wait_ready_async(timeout_s=0.1)
        with pytest.raises(harness.NotReady, match="still runs"):
            await server.wait_async(timeout_s=0.01)
        server.proc.kill()
        with pytest.raises(harness.ServerExited, match="SIGKILL"):
            await server.wait_ready_async(timeout_s=READY_S)

    run(use)


def test_a_watchdog_is_started_and_closed(run: Run, tmp_path: object) -> None:
    async def use() -> None:
        async with harness.Watchdog(state_dir=f"{tmp_path}/state") as watchdog:
            server = await watchdog.launch_async(["sleep", "60"])
            async with watchdog:
                assert server.is_alive
            assert not watchdog.is_alive
        assert server.outcome is not None
        assert server.outcome.how == "asked"

    run(use)


def test_asyncio_needs_no_sniffio(monkeypatch: pytest.MonkeyPatch, watchdog: harness.Watchdog) -> None:
    monkeypatch.setitem(sys.modules, "sniffio", None)

    async def use() -> None:
        await (await watchdog.launch_async(["sleep", "60"])).stop_async()

    asyncio.run(use())


def test_the_client_loads_no_async_library(run_script: Callable[..., str]) -> None:
    run_script(
        """
        import sys, harness
        with harness.Watchdog() as watchdog:
            watchdog.launch(["true"]).wait()
        assert not {"asyncio", "trio", "sniffio"} & set(sys.modules)
        """
    )


# ---- the event loop goes on


def test_others_run_while_a_server_gets_ready(run: Run, watchdog: harness.Watchdog) -> None:
    opened = threading.Event()

    async def use() -> None:
        server = await watchdog.launch_async(["sleep", "60"], ready=lambda _: opened.is_set())
        await beside(server.wait_ready_async(timeout_s=READY_S), opened.set)
        async with watchdog.group() as group:
            opened.clear()
            await group.launch_async(["sleep", "60"], ready=lambda _: opened.is_set())
            await beside(group.wait_ready_async(timeout_s=READY_S), opened.set)

    run(use)


def hold(watchdog: harness.Watchdog) -> None:
    """Stop a watchdog whose program runs: until then each request wakes it, so that it sees its test process's end."""
    watchdog.launch(["true"]).wait(READY_S)
    os.kill(watchdog.pid or 0, signal.SIGSTOP)


def test_others_run_while_a_server_is_launched(run: Run, watchdog: harness.Watchdog) -> None:
    async def use() -> None:
        hold(watchdog)
        await beside(watchdog.launch_async(["true"]), partial(os.kill, watchdog.pid or 0, signal.SIGCONT))

    run(use)


def test_others_run_while_a_server_is_stopped_and_waited_for(run: Run, watchdog: harness.Watchdog) -> None:
    async def use() -> None:
        for wait in (harness.Server.wait_async, harness.Server.stop_async):
            server = await watchdog.launch_async(STUBBORN, grace_s=LONG_S)
            await beside(wait(server), server.kill)

    async def leave() -> None:
        async with anyio.create_task_group() as tasks, watchdog.group() as group:
            in_group = await group.launch_async(STUBBORN, grace_s=LONG_S)
            async with await watchdog.launch_async(STUBBORN, grace_s=LONG_S) as server:
                tasks.start_soon(take_turns, server.kill)
            tasks.start_soon(take_turns, in_group.kill)

    run(use)
    run(leave)


def test_more_waits_than_a_pool_has_threads_do_not_hold_up_the_stop(run: Run, watchdog: harness.Watchdog) -> None:
    async def use() -> None:
        server = await watchdog.launch_async(["sleep", "60"])
        async with anyio.create_task_group() as tasks:
            for _ in range(60):
                tasks.start_soon(server.wait_async)
            await take_turns(lambda: None)
            await server.stop_async()

    run(use)


# ---- a launch that is cancelled


def test_a_launch_that_is_cancelled_at_any_instant_leaves_no_server(run: Run, watchdog: harness.Watchdog) -> None:
    chance = random.Random(7)  # noqa: S311 - no secret
    cancelled = 0

    async def use() -> None:
        nonlocal cancelled
        group = watchdog.group()
        await watchdog.launch_async(["true"])  # for which the watchdog starts
        began = anyio.current_time()
        for _ in range(10):
            await watchdog.launch_async(["true"])
        longest_s = (anyio.current_time() - began) / 5  # twice what one takes here and now
        for _ in range(TRIALS):
            with anyio.move_on_after(chance.uniform(0.0, longest_s)) as scope:
                await group.launch_async(["sleep", "1000"], name="rank0")
            if scope.cancelled_caught:
                cancelled += 1
                assert sleeping(watchdog) == []
            await group.stop_async()

    run(use)
    assert 0 < cancelled < TRIALS


def test_a_cancelled_launch_returns_when_its_server_is_gone(run: Run, watchdog: harness.Watchdog) -> None:
    """The watchdog is stopped: the order to launch waits there, and is carried out after the cancellation."""

    async def use() -> None:
        hold(watchdog)
        async with anyio.create_task_group() as tasks:
            with anyio.CancelScope() as scope:
                tasks.start_soon(take_turns, partial(cancel, tasks, scope))
                await watchdog.launch_async(["sleep", "1000"])
        assert scope.cancelled_caught
        assert sleeping(watchdog) == []
        assert {server.state for server in watchdog.servers} <= {"gone"}

    def cancel(tasks: TaskGroup, scope: anyio.CancelScope) -> None:
        scope.cancel()
        tasks.start_soon(take_turns, partial(os.kill, watchdog.pid or 0, signal.SIGCONT))

    run(use)


def test_a_launch_that_has_ended_as_it_is_cancelled_is_undone(run: Run, watchdog: harness.Watchdog) -> None:
    async def use() -> None:
        async with watchdog.group() as group:
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(cancel_when_it_has_ended, group, scope)
                    await group.launch_async(["sleep", "1000"], name="rank0")
                    pytest.fail("it was not cancelled")
            assert scope.cancelled_caught
            assert [server.state for server in group.servers] == ["gone"]
            assert (await group.launch_async(["sleep", "60"], name="rank0")).is_alive

    async def cancel_when_it_has_ended(group: harness.ServerGroup, scope: anyio.CancelScope) -> None:
        # Without an await: the task that launches is not told before it has been cancelled.
        processes.wait_for(lambda: len(group.servers) == 1, 10.0, "the server is launched")
        wait_for_threads()
        scope.cancel()

    run(use)


def test_a_launch_whose_task_is_dropped_leaves_no_server(watchdog: harness.Watchdog) -> None:
    async def drop(condition: Callable[[], bool]) -> None:
        launch = watchdog.launch_async(["sleep", "1000"])
        launch.send(None)
        processes.wait_for(condition, 10.0, "the launch has come so far")
        launch.close()

    for condition in (lambda: True, lambda: threads() == []):
        asyncio.run(drop(condition))
        wait_for_threads()
        processes.wait_for(lambda: sleeping(watchdog) == [], 10.0, "the server is gone")


def test_a_sibling_that_fails_cancels_and_nothing_is_left(run: Run, watchdog: harness.Watchdog) -> None:
    async def fail() -> None:
        await take_turns(lambda: None)
        raise ZeroDivisionError

    async def use() -> None:
        async with watchdog.group() as group:
            await group.launch_async(["sleep", "1000"], ready=lambda _: False)
            with pytest.RaisesGroup(ZeroDivisionError):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(fail)
                    tasks.start_soon(group.wait_ready_async)
                    tasks.start_soon(group.servers[0].wait_async)
        assert sleeping(watchdog) == []

    run(use)


# ---- waits that are cancelled


def test_a_cancelled_wait_ends_soon_and_leaves_the_server(run: Run, watchdog: harness.Watchdog) -> None:
    never = harness.port_open(port=1)
    checks: list[Check] = [harness.http_ok(), never, harness.log_line("never"), lambda _: False]

    async def use() -> None:
        for ready in checks:
            server = await watchdog.launch_async(web("silent"), ready=harness.log_line("listening"))
            await server.wait_ready_async(timeout_s=READY_S)
            server.ready = ready
            # These would wait for longer than a test may take.
            await cancelled_after_turns(partial(server.wait_ready_async, timeout_s=LONG_S))
            wait_for_threads()
            await cancelled_after_turns(partial(server.wait_async, timeout_s=LONG_S))
            wait_for_threads()
            server.ready = harness.log_line("listening")
            assert (await server.wait_ready_async(timeout_s=READY_S)).state == "running"

    run(use)


def test_a_cancelled_wait_of_a_group_ends_soon(run: Run, watchdog: harness.Watchdog) -> None:
    async def use() -> None:
        async with watchdog.group() as group:
            for _ in range(3):
                await group.launch_async(["sleep", "1000"], ready=lambda _: False)
            await cancelled_after_turns(partial(group.wait_ready_async, timeout_s=LONG_S))
            wait_for_threads()
            assert all(server.is_alive for server in group.servers)

    run(use)


def test_a_check_that_blocks_does_not_hold_up_the_cancellation(run: Run, watchdog: harness.Watchdog) -> None:
    """Nor does what it raises later stop the server, as it would if it were still waited for."""
    entered, blocked = threading.Event(), threading.Event()

    def check(_server: harness.Server) -> bool:
        entered.set()
        blocked.wait(LONG_S)
        raise ZeroDivisionError

    async def use() -> None:
        server = await watchdog.launch_async(["sleep", "1000"], ready=check)
        await cancelled_after_turns(server.wait_ready_async, entered.is_set)
        assert threads() == ["harness wait_ready"]
        blocked.set()
        wait_for_threads()
        assert server.state == "running"

    run(use)


# ---- a stop that is cancelled


def test_a_cancelled_stop_goes_on_and_loses_no_report(run: Run, watchdog: harness.Watchdog) -> None:
    stops: list[Callable[[harness.ServerGroup], Awaitable[object]]] = [
        lambda group: group.stop_async(),
        lambda group: watchdog.stop_async(group.servers),
        lambda group: group.servers[0].stop_async(),
    ]

    async def use() -> None:
        for stop in stops:
            group = watchdog.group()
            server = await group.launch_async(STUBBORN, grace_s=2.0, ready=harness.log_line("ready"))
            await group.wait_ready_async(timeout_s=READY_S)
            with Watched([server.pid]) as watched:
                await cancelled_after_turns(partial(stop, group))
                wait_for_threads()
                assert server.state != "running"
                assert watched.wait_gone(30.0) == []
            report = await group.stop_async()
            assert [outcome.how for outcome in report.outcomes] == ["killed"]

    run(use)


def test_a_stop_in_a_task_that_is_cancelled_already_is_ordered(run: Run, watchdog: harness.Watchdog) -> None:
    async def use() -> None:
        server = await watchdog.launch_async(["sleep", "1000"])
        with Watched([server.pid]) as watched:
            with anyio.CancelScope() as scope:
                scope.cancel()
                try:
                    await anyio.sleep(LONG_S)
                finally:
                    await server.stop_async()
            assert watched.wait_gone(30.0) == []

    run(use)


def test_whoever_leaves_has_stopped_everything_cancelled_or_not(run: Run, watchdog: harness.Watchdog) -> None:
    slow = family(member(takes_s=0.3))

    async def use() -> None:
        for is_early in (True, False):
            with anyio.CancelScope() as scope:
                async with watchdog.group() as group, await watchdog.launch_async(slow) as server:
                    servers = [server, await group.launch_async(slow)]
                    for one in servers:
                        one.ready = harness.log_line("ready")
                        await one.wait_ready_async(timeout_s=READY_S)
                    if is_early:
                        scope.cancel()
                        await anyio.sleep(LONG_S)
                    scope.deadline = anyio.current_time() + 0.05  # while the first is being stopped
                await anyio.sleep(LONG_S)
            assert scope.cancelled_caught
            assert [one.outcome.how for one in servers if one.outcome] == ["asked", "asked"]

    run(use)


def test_a_watchdog_that_is_left_by_a_cancellation_is_closed(run: Run, tmp_path: object) -> None:
    async def use() -> None:
        with anyio.CancelScope() as scope:
            async with harness.Watchdog(state_dir=f"{tmp_path}/state") as watchdog:
                server = await watchdog.launch_async(["sleep", "1000"])
                scope.cancel()
                await anyio.sleep(LONG_S)
        assert not watchdog.is_alive
        assert server.outcome is not None

    run(use)


def test_an_error_of_leaving_is_not_lost_by_a_cancellation(run: Run, watchdog: harness.Watchdog) -> None:
    async def use() -> None:
        with contextlib.suppress(ZeroDivisionError), anyio.CancelScope() as scope:
            async with watchdog.group() as group:
                await group.launch_async(["sleep", "1000"])
                os.kill(watchdog.pid or 0, signal.SIGKILL)
                scope.cancel()
        assert scope.cancel_called

    with pytest.raises(harness.WatchdogDied):
        run(use)
    with pytest.raises(harness.WatchdogDied):
        watchdog.close()
