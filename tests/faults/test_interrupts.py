"""An exception may strike the test process anywhere (Ctrl-C, pytest-timeout's SIGALRM): nothing may be lost by it."""

from __future__ import annotations

import random
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from faults.runs import Watched

import harness
from harness import procfs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# One that strikes in the callback of a weak reference is raised to nobody: Python says so, and goes on.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function Weak:pytest.PytestUnraisableExceptionWarning"
)

# Each trial is interrupted at another instant of the few milliseconds that a request takes.
TRIALS = 150


class Interrupt(BaseException):
    """What the handler raises, as KeyboardInterrupt is raised."""


@pytest.fixture
def watchdog(tmp_path: Path) -> Iterator[harness.Watchdog]:
    with harness.Watchdog(state_dir=tmp_path / "state") as owner:
        owner.launch(["true"])  # from here on a request takes as long as it always does
        yield owner


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    def interrupt(_signal: int, _frame: object) -> None:
        raise Interrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    # Where coverage measures, an exception that strikes while it holds its own lock would leave that locked for good.
    tracing = sys.gettrace()
    sys.settrace(None)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        sys.settrace(tracing)


def test_an_interrupted_launch_leaves_no_server_that_nobody_holds(watchdog: harness.Watchdog) -> None:
    chance = random.Random(7)  # noqa: S311 - no secret
    interrupts = 0
    longest_s = 2 * launch_s(watchdog)
    for _ in range(TRIALS):
        known = len(watchdog.servers)
        try:
            with interrupted_after(chance.uniform(0.00002, longest_s)):
                watchdog.launch(["sleep", "1000"])
        except Interrupt:
            interrupts += 1
        if len(watchdog.servers) > known:
            watchdog.servers[-1].kill()
        # An answer to a later request: whatever was ordered before has been carried out.
        assert watchdog.launch(["true"]).wait(timeout_s=30).how == "exited"
        assert processes_of(watchdog) == []
    assert 0 < interrupts < TRIALS


@pytest.mark.parametrize("kind", ["launched", "adopted"])
def test_a_launch_that_is_interrupted_once_it_is_known_has_an_outcome(
    watchdog: harness.Watchdog, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It is in `servers` by then: without its outcome it would count as alive until the watchdog ends."""

    def interrupt(*_: object, **__: object) -> None:
        monkeypatch.undo()
        raise Interrupt

    command = ["sleep", "1000"]
    with subprocess.Popen(command) as own:
        try:
            monkeypatch.setattr(harness.Server, "note", interrupt)
            with pytest.raises(Interrupt):
                watchdog.launch(command) if kind == "launched" else watchdog.adopt(own.pid)
        finally:
            own.kill()
    server = watchdog.servers[-1]
    assert server.name != "true-0"
    assert server.has_ended
    assert server.outcome is not None
    assert server.outcome.how == "killed"
    assert processes_of(watchdog) == []


def launch_s(watchdog: harness.Watchdog) -> float:
    """Give how long a launch takes here and now: interrupts are to strike within it, and after it."""
    times = []
    for _ in range(15):
        began = time.monotonic()
        watchdog.launch(["true"])
        times.append(time.monotonic() - began)
    return statistics.median(times)


def processes_of(watchdog: harness.Watchdog) -> list[str]:
    """Give what the servers of a watchdog run, and nobody has killed."""
    lines = [procfs.command_line(pid) for pid in procfs.descendants(watchdog.pid or 0)]
    return [line for line in lines if line.startswith("sleep")]


def test_an_interrupted_stop_goes_on_and_can_be_waited_for_again(watchdog: harness.Watchdog) -> None:
    chance = random.Random(7)  # noqa: S311 - no secret
    for _ in range(TRIALS // 5):
        group = watchdog.group()
        for _ in range(3):
            group.launch(["sleep", "1000"])
        with Watched([server.pid for server in group.servers]) as watched:
            try:
                with interrupted_after(chance.uniform(0.00002, 0.006)):
                    group.stop()
            except Interrupt:
                pass
            report = group.stop()
            assert watched.alive() == []
        assert {outcome.how for outcome in report.outcomes} == {"asked"}
