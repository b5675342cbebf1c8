"""The scenarios by name."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from tools import gpu_runs, gpu_tenants
from tools.gpu_stops import Plan, stop

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tools.gpu_trial import Trial

_GIB = 1024
_PINNED = ("--pinned-mib", str(16 * _GIB))
_IGNORES = ("--on-term", "ignore")


def cases(uuids: Sequence[str], total_mib: int) -> dict[str, Callable[[Trial, str], None]]:
    """Give them for these devices: 70 GiB where there is as much, else what fits."""
    one = uuids[0]
    found: dict[str, Callable[[Trial, str], None]] = {
        name: partial(_stop, plan) for name, plan in _plans(uuids, total_mib).items()
    }
    found["a stranger comes"] = partial(_on, gpu_tenants.comes, one)
    found["a stranger leaves"] = partial(_on, gpu_tenants.leaves, one)
    found["a leak"] = partial(_on, gpu_tenants.leak, one)
    found["a leak, and a stranger comes"] = lambda trial, state: gpu_tenants.leak(trial, state, one, "comes")
    found["a leak, and a stranger leaves"] = lambda trial, state: gpu_tenants.leak(trial, state, one, "leaves")
    found["early hand-over"] = partial(_on, gpu_runs.hand_over, one)
    found["pytest -n 4 on one device"] = partial(_on, gpu_runs.workers, one)
    found["SIGKILL of pytest"] = partial(_on, gpu_runs.killed, one)
    found["SIGKILL of a worker"] = lambda trial, state: gpu_runs.killed(trial, state, one, "-n", "1")
    return found


def _stop(plan: Plan, trial: Trial, state: str) -> None:
    stop(trial, state, plan)


def _on(run: Callable[[Trial, str, str], None], uuid: str, trial: Trial, state: str) -> None:
    run(trial, state, uuid)


def _plans(uuids: Sequence[str], total_mib: int) -> dict[str, Plan]:
    one = (tuple(uuids[:1]),)
    large = min(70 * _GIB, int(total_mib * 0.88))
    usual = min(20 * _GIB, large)
    plans: dict[str, Plan] = {}
    for name, options, grace_s in (("", (), 15.0), (", SIGTERM ignored", _IGNORES, 0.5)):
        for size, mib in (("0 GiB", 0), (f"{usual / _GIB:g} GiB", usual), (f"{large / _GIB:.0f} GiB", large)):
            for host, pinned in (("", ()), (", 16 GiB pinned", _PINNED)):
                plans[f"{size}{host}{name}"] = Plan(one, mib, (*pinned, *options), grace_s)
    share = total_mib // 8
    plans["4 servers on one device"] = Plan(one * 4, share, share_mib=share + 2 * _GIB)
    plans["3 processes"] = Plan(one, usual // 3, ("--children", "2"))
    if len(uuids) > 1:
        first, second = uuids[:2]
        plans["2 devices, one server"] = Plan(((first, second),), usual)
        plans["2 devices, a server on each"] = Plan(((first,), (second,)), usual)
    return plans
