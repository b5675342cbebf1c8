"""Servers that are stopped: when the memory was back, when the harness said so, and what today's logic says."""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import harness
from tools.gpu_polling import PERIOD_S, Polling, total_bytes
from tools.gpu_processes import command
from tools.gpu_sampling import SLACK_BYTES, Sampler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tools.gpu_trial import Trial

# So long the samples go on, to see that the memory stays free.
AFTER_S = 0.3
START_S = 60.0
# So long a server is used before its stop: the harness looks at its peak only now and then.
SERVES_S = 0.3


@dataclass(frozen=True)
class Plan:
    """What is launched: a server for each entry of `devices` (the UUIDs that it leases), each holding `mib`."""

    devices: tuple[tuple[str, ...], ...]
    mib: int
    options: tuple[str, ...] = ()
    grace_s: float = 15.0
    share_mib: int | None = None

    @property
    def uuids(self) -> list[str]:
        return list(dict.fromkeys(itertools.chain(*self.devices)))

    def launch(self, owner: harness.Watchdog) -> list[harness.Server]:
        """Launch all of them, and wait until they hold their memory."""
        servers = [
            owner.launch(
                command(self.mib, *self.options),
                name=f"server{number}",
                gpus=list(devices),
                gpu_memory_mib=self.share_mib,
                ready=harness.http_ok("/health"),
                grace_s=self.grace_s,
            )
            for number, devices in enumerate(self.devices)
        ]
        return [server.wait_ready(timeout_s=START_S) for server in servers]


def stop(trial: Trial, state: str, plan: Plan) -> None:
    """Launch, stop, and hold each answer against the samples."""
    base = total_bytes()
    with contextlib.ExitStack() as stack:
        samplers = {uuid: stack.enter_context(Sampler(uuid)) for uuid in plan.uuids}
        time.sleep(0.05)
        owner = stack.enter_context(harness.Watchdog(state_dir=state))
        servers = plan.launch(owner)
        time.sleep(SERVES_S)
        # Who polls each second may look at any moment of it.
        polling = Polling(base, delay_s=random.uniform(0, PERIOD_S))  # noqa: S311 - no secret
        after_exit = Polling(base, roots=[server.pid for server in servers])
        began = time.monotonic()
        polling.start()
        after_exit.start()
        report = owner.stop(servers)
        returned = time.monotonic()
        for one in (polling, after_exit):
            one.join(START_S)
        time.sleep(AFTER_S)
    for uuid, sampler in samplers.items():
        rows = [row for outcome in report.outcomes for row in outcome.gpu if row.uuid == uuid]
        judge(trial, sampler, rows)
    last = max((sampler.freed(sampler.base + SLACK_BYTES) for sampler in samplers.values()), key=lambda one: one.at)
    if last.held is None:
        trial.not_shown = "nothing was held"
        return
    trial.figures["free_after_ms"] = round((last.at - began) * 1e3, 1)
    trial.figures["returned_after_ms"] = round((returned - began) * 1e3, 1)
    trial.today("polled_from_the_stop_on_behind_ms", polling, last)
    trial.today("polled_after_the_exit_behind_ms", after_exit, last)
    if last.is_after(returned):
        trial.wrong.append("the stop returned before the memory was back")
    if {row.uuid for outcome in report.outcomes for row in outcome.gpu} != set(plan.uuids):
        trial.wrong.append(f"not each device is in the report: {report.gpu}")


def judge(trial: Trial, sampler: Sampler, rows: Sequence[harness.DeviceRelease]) -> None:
    """Hold what was said of each tenant of one device, all of which held as much, against its samples.

    When the first of four was said to be back, three fourths may have been in use at most. Only of the last one can the
    sampler tell when it was back: two that have given back half each look like one that has given back all.
    """
    trial.figures.update(sampler.figures())
    each = (sampler.peak - sampler.base) / len(rows)
    for left, row in enumerate(sorted(rows, key=lambda row: -(row.freed_at or 0.0))):
        moment = sampler.freed(sampler.base + left * each + SLACK_BYTES)
        trial.verdict(row.verdict, "freed" if moment.is_free else "held", row)
        if row.verdict == "freed":
            trial.freed_at(row.freed_at, moment, is_exact=left == 0)
        if row.foreign or row.own:
            trial.wrong.append(f"somebody is on the device who is not: {row}")
    if len(rows) == 1 and abs((rows[0].peak_mib or 0) - sampler.peak / (1 << 20)) > SLACK_BYTES >> 20:
        trial.wrong.append(f"the peak was {sampler.peak / (1 << 20):.0f} MiB: {rows[0]}")
