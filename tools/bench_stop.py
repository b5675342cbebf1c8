"""Stopping many servers at once, against the slowest of them."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import harness
from tools import bench_figures as figures
from tools.bench_processes import MILLISECONDS, python_program

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tools.bench_figures import Figure, Settings

_STOP_S = 1.0
_GRACE_S = 15.0
_SENT = re.compile(r"^(\d+\.\d+) (?:pidfd_send_signal|kill)\(.*SIGTERM", re.MULTILINE)
_FIRST_LIMIT_MS = 3.0
_SPREAD_LIMIT_MS = 20.0


class _Stop(NamedTuple):
    """One stop of some servers: seconds, and moments in seconds after the call."""

    took_s: float
    slowest_s: float
    asked_s: Sequence[float]
    sent_s: Sequence[float]


def stop_8(settings: Settings) -> list[Figure]:
    """Stop 8 servers that need 1 s each, against the time that the slowest of them says it took.

    Nothing can stop them sooner than the slowest ends, and stopping them one by one takes 8 times as long.
    """
    return _stop(settings, servers=8, limit=1.03)


def stop_64(settings: Settings) -> list[Figure]:
    """Stop 64 servers that need 1 s each, against the time that the slowest of them says it took.

    As for 8, but here 64 servers and 64 keepers exit at one instant; the limit leaves the machine time to end them.
    """
    return _stop(settings, servers=64, limit=1.10)


def _stop(settings: Settings, *, servers: int, limit: float) -> list[Figure]:
    name = f"stop-{servers}"
    stops = [_one_stop(settings.scratch, servers, is_traced=False) for _ in range(settings.choose(3, 1))]
    traced = [_one_stop(settings.scratch, servers, is_traced=True) for _ in range(settings.choose(3, 2))]
    moments, source = _sending_moments(traced)
    firsts_ms = [min(moment) * MILLISECONDS for moment in moments]
    spreads_ms = [(max(moment) - min(moment)) * MILLISECONDS for moment in moments]
    found = [
        figures.ratio(name, "s", [stop.took_s for stop in stops], [stop.slowest_s for stop in stops], limit),
        figures.plain(f"{name} first SIGTERM", "ms", firsts_ms, _FIRST_LIMIT_MS, note=_note(stops, source)),
    ]
    if servers > 8:  # for few servers the spread says nothing that the first SIGTERM does not
        found.append(figures.plain(f"{name} last SIGTERM after first", "ms", spreads_ms, _SPREAD_LIMIT_MS))
    return found


def _sending_moments(traced: list[_Stop]) -> tuple[list[Sequence[float]], str]:
    if all(stop.sent_s for stop in traced):
        return [stop.sent_s for stop in traced], "moments of sending, from strace of the watchdog in stops of their own"
    return [stop.asked_s for stop in traced], "moments at which the servers ran again, since strace cannot be used"


def _note(stops: list[_Stop], source: str) -> str:
    firsts_ms = statistics.median(min(stop.asked_s) for stop in stops) * MILLISECONDS
    lasts_ms = statistics.median(max(stop.asked_s) for stop in stops) * MILLISECONDS
    return f"{source}; untraced, the servers saw it {firsts_ms:.2f} to {lasts_ms:.2f} ms after the call"


def _one_stop(scratch: Path, count: int, *, is_traced: bool) -> _Stop:
    with harness.Watchdog(state_dir=scratch / "state") as watchdog, watchdog.group("bench") as group:
        paths = [scratch / f"stop-{number}.times" for number in range(count)]
        for path in paths:
            command = python_program("bench_server_slow_stop.py", str(_STOP_S), str(path))
            group.launch(command, ready=harness.log_line("ready"), grace_s=_GRACE_S)
        group.wait_ready(timeout_s=60.0)
        trace = scratch / "stop.strace"
        with _traced(watchdog.pid or 0, trace, is_traced=is_traced):
            called, called_at = time.monotonic(), time.time()
            report = group.stop()
            took_s = time.monotonic() - called
        if not report.is_clean or any(outcome.how != "asked" for outcome in report.outcomes):
            raise RuntimeError(f"the servers were not stopped as they should be: {report}")
        times = [tuple(map(float, path.read_text(encoding="ascii").split())) for path in paths]
        sent_s = [float(at) - called_at for at in _SENT.findall(trace.read_text())] if trace.exists() else []
        trace.unlink(missing_ok=True)
        return _Stop(
            took_s,
            slowest_s=max(exited - asked for asked, exited in times),
            asked_s=[asked - called for asked, _ in times],
            sent_s=sent_s if len(sent_s) == count else (),
        )


@contextmanager
def _traced(pid: int, output: Path, *, is_traced: bool) -> Iterator[None]:
    """Trace the signals that a process sends, where strace is there and may do it."""
    if not is_traced or shutil.which("strace") is None:
        yield
        return
    command = ["strace", "-ttt", "-e", "trace=pidfd_send_signal,kill", "-o", str(output), "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        if strace.stderr is not None:
            strace.stderr.readline()  # "Process PID attached", or why not
        try:
            yield
        finally:
            strace.terminate()
