"""Others on the device, and leaks: whose memory it is must be told rightly while tenants from outside come and go."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from typing import TYPE_CHECKING

import harness
from tools.gpu_polling import Polling, total_bytes
from tools.gpu_processes import hoarder, stranger
from tools.gpu_sampling import SLACK_BYTES, Sampler
from tools.gpu_stops import AFTER_S, Plan

if TYPE_CHECKING:
    import subprocess

    from tools.gpu_trial import Trial

OURS_MIB = 4096
STRANGERS_MIB = 6144
# So long our server holds its memory after it was asked to exit: a stranger comes up in the meantime.
HOLDS_S = 5.0
# So long memory may take to come back before it is a leak; today's logic is given no more.
RELEASE_S = 4.0


class _Stop(threading.Thread):
    """Stops a server in a thread, while others come and go."""

    def __init__(self, owner: harness.Watchdog, server: harness.Server) -> None:
        super().__init__(daemon=True)
        self._owner = owner
        self._server = server
        self.began = time.monotonic()
        self.start()

    def run(self) -> None:
        self._report = self._owner.stop([self._server])
        self._returned = time.monotonic()

    def end(self) -> tuple[harness.StopReport, harness.DeviceRelease, float]:
        """Give the report, the device's row in it, and when it was there."""
        self.join(60)
        (row,) = self._report.outcomes[0].gpu
        return self._report, row, self._returned


def _ours(uuid: str) -> Plan:
    return Plan(((uuid,),), OURS_MIB, ("--on-term", "ignore"), grace_s=HOLDS_S)


def comes(trial: Trial, state: str, uuid: str) -> None:
    """Have a tenant from outside come between the stop's begin and the memory's return, and stay."""
    base = total_bytes()
    with Sampler(uuid) as sampler, harness.Watchdog(state_dir=state) as owner:
        (server,) = _ours(uuid).launch(owner)
        polling = Polling(base, roots=[server.pid], limit_s=2.5)
        stop = _Stop(owner, server)
        with stranger(uuid, STRANGERS_MIB) as other:
            came = time.monotonic()
            polling.start()
            _, row, _ = stop.end()
            polling.join(60)
            time.sleep(AFTER_S)
            ended = time.monotonic()
    ours = sampler.freed(sampler.used_at(ended) + SLACK_BYTES, until=ended)
    trial.figures.update(stranger_after_s=round(came - stop.began, 2), foreign=len(row.foreign), **sampler.figures())
    trial.verdict(row.verdict, "freed" if ours.is_free else "held", row)
    trial.freed_at(row.freed_at, ours)
    trial.today("polled_after_the_exit", polling, ours)
    if [process.pid for process in row.foreign] != [other.pid]:
        trial.wrong.append(f"the stranger, pid {other.pid}, is not named: {row}")
    if not ours.is_after(came):
        trial.not_shown = "the stranger came too late"


def leaves(trial: Trial, state: str, uuid: str) -> None:
    """Have a tenant from outside leave between the stop's begin and the memory's return."""
    with Sampler(uuid) as sampler, harness.Watchdog(state_dir=state) as owner, stranger(uuid, STRANGERS_MIB) as other:
        base = total_bytes()
        (server,) = _ours(uuid).launch(owner)
        polling, after_exit = Polling(base), Polling(base, roots=[server.pid])
        stop = _Stop(owner, server)
        polling.start()
        after_exit.start()
        other.kill()
        other.wait()
        left = time.monotonic()
        _, row, _ = stop.end()
        polling.join(60)
        after_exit.join(60)
        time.sleep(AFTER_S)
    ours = sampler.freed(sampler.base + SLACK_BYTES)
    trial.figures.update(stranger_left_after_s=round(left - stop.began, 2), **sampler.figures())
    trial.verdict(row.verdict, "freed" if ours.is_free else "held", row)
    trial.freed_at(row.freed_at, ours)
    trial.today("polled_from_the_stop_on", polling, ours)
    trial.today("polled_after_the_exit_behind_ms", after_exit, ours)
    if not ours.is_after(left):
        trial.not_shown = "the stranger left too late"


def leak(trial: Trial, state: str, uuid: str, others: str = "") -> None:
    """Have the memory of our server outlive it; the stranger `others` ("comes", "leaves" or "") meanwhile."""
    with contextlib.ExitStack() as stack:
        sampler = stack.enter_context(Sampler(uuid))
        # A leak that stop() has told is raised once more at the end.
        stack.enter_context(contextlib.suppress(harness.GpuNotReleased))
        owner = stack.enter_context(harness.Watchdog(state_dir=state, gpu_release_s=RELEASE_S, gpu_wait_s=30.0))
        other = stack.enter_context(stranger(uuid, STRANGERS_MIB)) if others == "leaves" else None
        base = total_bytes()
        (server,) = Plan(((uuid,),), OURS_MIB).launch(owner)
        keeps = stack.enter_context(hoarder(server.pid))
        polling = Polling(base, roots=[server.pid], limit_s=RELEASE_S)
        polling.start()
        stop = _Stop(owner, server)
        other = _change(stack, uuid, others, other)
        changed = time.monotonic()
        report, row, said = stop.end()
        polling.join(60)
        complaints = _quarantine(trial, state, uuid, report)
        keeps_until = time.monotonic()
        keeps.communicate()  # which closes its standard input
        if other is not None:
            other.kill()
            other.wait()
        granted = _granted(owner, uuid)
        time.sleep(AFTER_S)
    if _is_leak(trial, sampler, row, said):
        trial.wrong += complaints
        trial.verdict(row.verdict, "held", row)
        trial.answers.append((polling.answer, "held"))
        trial.figures["polled_after_the_exit"] = polling.answer if polling.freed_at is None else "wrong: says freed"
    back = sampler.freed(sampler.base + SLACK_BYTES)
    trial.figures["lent_again_behind_sampler_ms"] = round((granted - back.at) * 1e3, 1)
    if others and changed > said:
        trial.not_shown = "the stranger came or left too late"
    if back.is_after(granted) or granted < keeps_until:
        trial.wrong.append("the device was lent again while its memory was held")


def _change(
    stack: contextlib.ExitStack, uuid: str, others: str, other: subprocess.Popen[bytes] | None
) -> subprocess.Popen[bytes] | None:
    if others == "comes":
        return stack.enter_context(stranger(uuid, STRANGERS_MIB))
    if other is not None:
        other.kill()
        other.wait()
    return None


def _is_leak(trial: Trial, sampler: Sampler, row: harness.DeviceRelease, said: float) -> bool:
    """Say whether the memory was held when the verdict was there, and check the size that people are told."""
    strangers = sum((process.used_mib or 0) << 20 for process in row.foreign)
    kept_mib = round((sampler.used_at(said) - sampler.base - strangers) / (1 << 20))
    trial.figures.update(
        kept_mib=kept_mib, own=len(row.own), foreign=len(row.foreign), note=row.note, **sampler.figures()
    )
    if kept_mib < OURS_MIB * 0.9:
        trial.not_shown = f"the server's memory did not outlive it: {row}"
        return False
    told = re.findall(r"(-?\d+) MiB did not come back", trial.figures.get("refusal", ""))
    if not told or abs(int(told[0]) - kept_mib) > SLACK_BYTES >> 20:
        trial.wrong.append(f"the quarantine's reason tells {told} MiB, and {kept_mib} MiB are held")
    return True


def _quarantine(trial: Trial, state: str, uuid: str, report: harness.StopReport) -> list[str]:
    """Say what is wrong unless the leak fails who stopped the server, and the device is refused to the next."""
    wrong = []
    try:
        report.raise_if_leaked()
        wrong.append("a leak fails nobody")
    except harness.GpuNotReleased as error:
        trial.figures["error"] = str(error)[-500:]
    try:
        with harness.Watchdog(state_dir=state, gpu_wait_s=10.0) as next_one:
            _granted(next_one, uuid)
        wrong.append("the device was lent while it was held")
    except harness.GpuUnavailable as error:
        trial.figures["refusal"] = str(error)[-300:]
    return wrong


def _granted(owner: harness.Watchdog, uuid: str) -> float:
    """Lease a device, give it back, and give when it was granted."""
    group = owner.group("next", gpus=[uuid])
    group.lease_gpus()
    granted = time.monotonic()
    group.stop()
    return granted
