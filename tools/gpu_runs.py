"""Leases that pass from one to the next: in runs of pytest, after a SIGKILL, and while the old server still ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import harness
from harness import procfs
from tools.gpu_polling import Polling, total_bytes
from tools.gpu_processes import ROOM_MIB, SUITE_MIB, pytest_run
from tools.gpu_sampling import SLACK_BYTES, Sampler
from tools.gpu_stops import AFTER_S, START_S, Plan

if TYPE_CHECKING:
    from pathlib import Path

    from tools.gpu_sampling import Moment
    from tools.gpu_trial import Trial

LINGER_S = 2.0
# So long the next one has waited when the device is given up.
_WAITS_S = 1.0


class _Next(threading.Thread):
    """The next one who wants a device: `granted` is when it was, and `saw_alive` whether a process lived on then."""

    def __init__(self, owner: harness.Watchdog, uuid: str, pid: int) -> None:
        super().__init__(daemon=True)
        self._owner = owner
        self._uuid = uuid
        self._pid = pid
        self.granted = float("inf")
        self.saw_alive = False
        self.start()

    def run(self) -> None:
        with self._owner.group("next", gpus=[self._uuid]) as group:
            group.lease_gpus()
            self.granted = time.monotonic()
            self.saw_alive = os.path.exists(f"/proc/{self._pid}")


def _judge(trial: Trial, sampler: Sampler, moment: Moment, began: float, granted: float) -> None:
    trial.figures.update(sampler.figures())
    trial.figures.update(
        free_after_ms=round((moment.at - began) * 1e3, 1),
        sampler_window_ms=round(moment.window_ms, 3),
        granted_behind_sampler_ms=round((granted - moment.at) * 1e3, 2),
    )
    if moment.is_after(granted):
        trial.wrong.append("the device was granted while its memory was held")


def hand_over(trial: Trial, state: str, uuid: str) -> None:
    """See that the next lease is granted when the memory is back, though the old server's process lives on."""
    base = total_bytes()
    plan = Plan(((uuid,),), 8192, ("--on-term", f"free-then-linger:{LINGER_S:g}", "--pinned-mib", "2048"), grace_s=30.0)
    with (
        Sampler(uuid) as sampler,
        harness.Watchdog(state_dir=state) as one,
        harness.Watchdog(state_dir=state) as other,
    ):
        (old,) = plan.launch(one)
        following = _Next(other, uuid, old.pid)
        time.sleep(_WAITS_S)
        polling = Polling(base, roots=[old.pid])
        began = time.monotonic()
        polling.start()
        report = one.stop([old])
        ended = time.monotonic()
        is_left = os.path.exists(f"/proc/{old.pid}")
        following.join(30)
        polling.join(60)
        time.sleep(AFTER_S)
    moment = sampler.freed(sampler.base + SLACK_BYTES)
    _judge(trial, sampler, moment, began, following.granted)
    trial.figures["old_ended_after_ms"] = round((ended - began) * 1e3, 1)
    (row,) = report.outcomes[0].gpu
    trial.verdict(row.verdict, "freed" if moment.is_free else "held", row)
    trial.freed_at(row.freed_at, moment)
    trial.today("polled_after_the_exit_behind_ms", polling, moment)
    if not following.saw_alive or ended - began < LINGER_S:
        trial.wrong.append("the device was granted only when the old server had ended")
    if is_left or report.outcomes[0].how != "asked":
        trial.wrong.append(f"the old server was not watched to its end: {report}")


def workers(trial: Trial, state: str, uuid: str) -> None:
    """Have four workers share one device by leases: at no time more than one server holds its memory."""
    with Sampler(uuid) as sampler, pytest_run(state, uuid, 8, 0.0, "-n", "4") as (run, folder):
        began = time.monotonic()
        output = run.communicate(timeout=120)[0].decode(errors="replace")
        took_s = time.monotonic() - began
        count = len(list(folder.glob("up-*")))
    most_mib = round((sampler.peak - sampler.base) / (1 << 20))
    trial.figures.update(seconds=round(took_s, 1), servers=count, most_mib=most_mib, **sampler.figures())
    if run.returncode or count != 8:
        trial.wrong.append(output[-2000:])
    if not SUITE_MIB <= most_mib <= SUITE_MIB + ROOM_MIB:
        trial.wrong.append(f"{most_mib} MiB were in use at once")
    if sampler.end > sampler.base + SLACK_BYTES:
        trial.wrong.append("memory was left in use")


def killed(trial: Trial, state: str, uuid: str, *options: str) -> None:
    """Kill pytest (with -n: a worker) in a test whose server holds memory, while another run waits for the device."""
    with Sampler(uuid) as sampler, pytest_run(state, uuid, 1, 60.0, *options) as (run, folder):
        server = _started(folder / "up-0")
        # A controller of pytest-xdist has no watchdog: its only children are workers.
        victim = procfs.children(run.pid)[0] if options else run.pid
        with harness.Watchdog(state_dir=state) as other:
            following = _Next(other, uuid, server)
            time.sleep(_WAITS_S)
            began = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            following.join(60)
            time.sleep(AFTER_S)
            until = time.monotonic()
            run.kill()
    moment = sampler.freed(sampler.base + SLACK_BYTES, until=until)
    _judge(trial, sampler, moment, began, following.granted)
    if not moment.is_after(began):
        trial.wrong.append("the server's memory was back before the kill")
    if os.path.exists(f"/proc/{server}"):
        trial.wrong.append("the server has outlived its test process")


def _started(path: Path) -> int:
    deadline = time.monotonic() + START_S
    while not path.exists() or not path.read_text(encoding="utf-8"):
        assert time.monotonic() < deadline, "the suite has launched no server"
        time.sleep(0.01)
    return int(path.read_text(encoding="utf-8"))
