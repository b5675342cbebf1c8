"""What a trial does: a pure function of its seed. Knows no clock, process or file."""

from __future__ import annotations

import errno
import random
import signal
from dataclasses import dataclass
from typing import Any

from tools.chaos_steps import KEEPER, PYTEST, STEPS, TARGETS, WATCHDOG, WORKER

_SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT)
_XDIST_SHARE = 0.2
_STEP_SHARE = 0.6
_SIBLING_SHARE = 0.1
# How often each kind of fault is chosen, in parts of all.
KINDS = {
    "signal": 52,
    "two": 18,
    "close the Pipe": 5,
    "fill the log disk": 4,
    "no descriptors": 7,
    "no processes": 5,
    "fork fails": 5,
    "exec fails": 4,
}
_SHORTAGES = ("no descriptors", "no processes")
MOST_PROCESSES = 40


@dataclass(frozen=True)
class Fault:
    """One thing that is done to one process. `amount` is how many more descriptors or processes it may have."""

    kind: str
    target: str
    signal: int = 0
    amount: int = 0

    def __str__(self) -> str:
        """Name it as a row of the table does."""
        return signal.Signals(self.signal).name if self.signal else self.kind


@dataclass(frozen=True)
class Failure:
    """A call that fails once: in which process, at which of the run's launches (from 1), with what errno."""

    where: str
    launch: int
    errno: int


@dataclass(frozen=True)
class When:
    """When the fault strikes: the `nth` time that a step is reached, or some time after the run's start.

    With `is_while_stopping` the time counts from when the servers are up, and the test goes on meanwhile. A target that
    is not there at that time gets `late_s` more from when it comes.
    """

    step: str = ""
    nth: int = 1
    after_s: float = 0.0
    is_while_stopping: bool = False
    late_s: float = 0.0


@dataclass(frozen=True)
class Server:
    """One launch: its tree as `chaos_server` takes it, and launch's options."""

    tree: dict[str, Any]
    grace_s: float
    ask: str
    ready: str


@dataclass(frozen=True)
class Plan:
    """One trial. `linger_s` is how long a stopped process stays so before it is killed, as CI would.

    `may_use_cgroups`: the harness may give each server a cgroup, where that can be done; else it must sweep.
    """

    seed: int
    workers: int
    tests: tuple[tuple[Server, ...], ...]
    faults: tuple[Fault, ...]
    failure: Failure | None
    when: When
    crash_grace_s: float
    linger_s: float
    has_sibling: bool
    may_use_cgroups: bool

    @property
    def fault(self) -> str:
        """Name the row of the table."""
        if self.failure is not None:
            return "exec fails" if self.failure.where in {"watchdog image", "root"} else "fork fails"
        return "two at once" if len(self.faults) > 1 else str(self.faults[0])

    @property
    def target(self) -> str:
        """Name who is hit."""
        if self.failure is not None:
            return {"watchdog image": WATCHDOG, "client": PYTEST}.get(self.failure.where, self.failure.where)
        return " + ".join(sorted({fault.target for fault in self.faults}, key=(*TARGETS, "log disk", "run").index))

    @property
    def may_leave_to_sweep(self) -> bool:
        """Say whether a watchdog and a keeper are both killed: only then may something be left to the next sweep."""
        killed = {fault.target for fault in self.faults if fault.signal == signal.SIGKILL}
        return {WATCHDOG, KEEPER} <= killed


def trial_seed(seed: int, index: int) -> int:
    """Give the seed of one trial of a run."""
    return random.Random(f"{seed}/{index}").getrandbits(40)  # noqa: S311 - to be repeated, not to be secret


def plan(seed: int, only: str | None = None) -> Plan:
    """Give the trial of a seed; `only` names the kind of fault, which otherwise is chosen as well."""
    dice = random.Random(seed)  # noqa: S311 - as above
    kind = dice.choices(list(KINDS), list(KINDS.values()))[0]
    kind = only or kind
    workers = 2 if dice.random() < _XDIST_SHARE else 0
    sizes = [dice.choices((1, 2, 3), (5, 3, 1))[0] for _ in range(workers or dice.choice((1, 1, 2)))]
    when, targets = _when(dice, kind, sizes[0], workers)
    failure = _failure(dice, kind, sizes[0])
    faults = () if failure else _faults(dice, kind, targets)
    return Plan(
        seed=seed,
        workers=workers,
        tests=tuple(_servers(dice, size, when, kind) for size in sizes),
        faults=faults,
        failure=failure,
        when=When() if failure else when,
        crash_grace_s=dice.choice((0.3, 0.4, 0.5)),
        linger_s=round(dice.uniform(0.05, 0.6), 3),
        has_sibling=dice.random() < _SIBLING_SHARE and kind not in _SHORTAGES and failure is None,
        may_use_cgroups=dice.random() < 0.5,
    )


def _when(dice: random.Random, kind: str, servers: int, workers: int) -> tuple[When, list[str]]:
    targets = [target for target in TARGETS if target != WORKER or workers]
    if dice.random() >= _STEP_SHARE:
        if dice.random() < 0.3:
            return When(after_s=round(dice.uniform(0.0, 0.4), 4), is_while_stopping=True), targets
        late_s = round(dice.uniform(0.0, 0.4), 4)
        return When(after_s=round(dice.triangular(0.0, 1.5, 0.4), 4), late_s=late_s), targets
    # Two at once need two targets that exist at that step.
    steps = [step for step in STEPS.values() if kind != "two" or KEEPER in step.targets or workers]
    step = dice.choice(steps)
    nth = dice.randint(1, servers) if step.most == "servers" else 1
    return When(step=step.name, nth=nth), [target for target in targets if target in step.targets]


def _faults(dice: random.Random, kind: str, targets: list[str]) -> tuple[Fault, ...]:
    if kind == "signal":
        return (_signalled(dice, dice.choice(targets)),)
    if kind == "two":
        first, second = dice.sample(targets, 2)
        if dice.random() < 0.5:  # the hardest: both are killed
            return tuple(Fault("signal", target, signal.SIGKILL) for target in (first, second))
        return (_signalled(dice, first), _signalled(dice, second))
    one = {
        "no descriptors": Fault(kind, dice.choice(targets), amount=dice.choice((-99, 0, 1, 2, 4))),
        "no processes": Fault(kind, "run", amount=dice.choice((0, 0, 1, 2, 5))),
        "fill the log disk": Fault(kind, "log disk"),
        "close the Pipe": Fault(kind, WORKER if WORKER in targets else PYTEST),
    }
    return (one[kind],)


def _signalled(dice: random.Random, target: str) -> Fault:
    return Fault("signal", target, dice.choices(_SIGNALS, (4, 3, 2, 2))[0])


def _failure(dice: random.Random, kind: str, servers: int) -> Failure | None:
    if kind not in {"fork fails", "exec fails"}:
        return None
    fork = (("client", 1), ("watchdog", 3), ("keeper", 4))
    places = fork if kind == "fork fails" else (("watchdog image", 1), ("root", 3))
    where = dice.choices([place for place, _ in places], [share for _, share in places])[0]
    return Failure(where, dice.randint(1, servers), dice.choice((errno.EAGAIN, errno.ENOMEM)))


def _servers(dice: random.Random, size: int, when: When, kind: str) -> tuple[Server, ...]:
    must_be_killed = when.step in {"kill is ordered", "before the kill", "in the kill"}
    storms = [dice.random() < 0.05 and index == 0 for index in range(size)]
    return tuple(_server(dice, when, kind, must_be_killed=must_be_killed, is_storm=storm) for storm in storms)


def _server(dice: random.Random, when: When, kind: str, *, must_be_killed: bool, is_storm: bool) -> Server:
    tree = _node(dice, "root", depth=0)
    must_live = must_be_killed or when.is_while_stopping
    if must_live:
        tree.update(ignores=True, slow_s=0.0)
    # Where a stop must come, its servers must be there.
    stays = bool(when.step) or when.is_while_stopping or kind == "two"
    tree["leaves"] = not stays and dice.random() < 0.1
    tree["chats"] = kind == "fill the log disk"
    if is_storm:
        tree["storm"] = dice.randint(15, MOST_PROCESSES - 10)
    ready = dice.choices(("log", "port", "none"), (6, 2, 2))[0]
    if must_live and ready == "none":
        ready = "log"  # before that it may not ignore SIGTERM yet
    return Server(
        tree=tree,
        grace_s=0.6 if when.is_while_stopping else dice.choice((0.1, 0.3, 0.6)),
        ask="group" if dice.random() < 0.15 else "root",
        ready="call" if when.step == "waiting for readiness" else ready,
    )


def _node(dice: random.Random, how: str, depth: int) -> dict[str, Any]:
    most = (3, 2, 0)[depth]
    hows = dice.choices(("worker", "setsid", "daemon"), (3, 2, 3), k=dice.randint(0, most))
    return {
        "how": how,
        "ignores": dice.random() < 0.4,
        "slow_s": dice.choice((0.0, 0.0, 0.0, 0.2, 5.0)),
        "clears": dice.random() < 0.1,
        "retitles": dice.random() < 0.1,
        "hops_s": dice.choice((0.01, 0.03)) if depth and dice.random() < 0.05 else 0.0,
        "storm": 0,
        "chats": False,
        "leaves": False,
        "below": [_node(dice, below, depth + 1) for below in hows],
    }
