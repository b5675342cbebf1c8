"""The plan of a trial: the same for the same seed, everything that it may do comes, nothing that makes no sense."""

from __future__ import annotations

import signal
from collections import Counter
from typing import Any

import pytest

from tools import chaos_hooks
from tools.chaos_plan import KINDS, MOST_PROCESSES, Plan, plan, trial_seed
from tools.chaos_steps import STEPS, TARGETS, WORKER

PLANS = [plan(trial_seed(1, index)) for index in range(4000)]


def test_a_seed_gives_the_same_plan_always() -> None:
    assert [plan(found.seed) for found in PLANS[:200]] == PLANS[:200]
    assert plan(trial_seed(1, 5)) != plan(trial_seed(2, 5))


def test_seeds_are_what_they_were() -> None:
    """A seed in an old table must still repeat its trial."""
    assert [trial_seed(1, index) for index in range(3)] == [751217575912, 122384010693, 919502754928]


def test_every_step_and_every_fault_comes() -> None:
    assert {found.when.step for found in PLANS} == {"", *STEPS}
    signals = {(fault.target, fault.signal) for found in PLANS for fault in found.faults if fault.signal}
    assert signals == {
        (target, number)
        for target in TARGETS
        for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT)
    }
    pairs = {found.target for found in PLANS if found.fault == "two at once"}
    assert pairs == {f"{a} + {b}" for at, a in enumerate(TARGETS) for b in TARGETS[at + 1 :]}
    failing = {found.failure.where for found in PLANS if found.failure}
    assert failing == {"client", "watchdog image", "watchdog", "keeper", "root"}


@pytest.mark.parametrize("kind", list(KINDS))
def test_one_kind_can_be_asked_for(kind: str) -> None:
    plans = [plan(seed, kind) for seed in range(50)]
    if kind not in {"signal", "two"}:
        assert {found.fault for found in plans} == {kind}
    assert len({found.fault + found.target for found in plans if found.fault != kind}) != 1


def test_each_kind_comes_about_as_often_as_it_should() -> None:
    found = Counter(found.fault for found in PLANS)
    signals = sum(found[number.name] for number in signal.Signals)
    assert signals / len(PLANS) == pytest.approx(KINDS["signal"] / 100, abs=0.03)
    assert found["two at once"] / len(PLANS) == pytest.approx(KINDS["two"] / 100, abs=0.03)


def test_targets_are_there_when_the_step_is() -> None:
    for found in PLANS:
        step = STEPS.get(found.when.step)
        for fault in found.faults:
            assert fault.target != WORKER or found.workers
            assert step is None or fault.target not in TARGETS or fault.target in step.targets


def test_what_must_be_reached_is_reached_often_enough() -> None:
    for found in PLANS:
        assert found.when.nth == 1 or found.when.nth <= len(found.tests[0])


def test_trees_are_hostile_and_bounded() -> None:
    nodes = [node for found in PLANS for node in trial_nodes(found)]
    for trait in ("ignores", "clears", "retitles", "leaves", "hops_s", "slow_s", "storm", "chats"):
        assert any(node[trait] for node in nodes), trait
    assert {node["how"] for node in nodes} == {"root", "worker", "setsid", "daemon"}
    assert max(sum(1 + node["storm"] for node in tree_nodes(s.tree)) for p in PLANS for t in p.tests for s in t) <= (
        MOST_PROCESSES
    )


def trial_nodes(found: Plan) -> list[dict[str, Any]]:
    return [node for test in found.tests for server in test for node in tree_nodes(server.tree)]


def tree_nodes(node: dict[str, Any]) -> list[dict[str, Any]]:
    return [node, *(below for child in node["below"] for below in tree_nodes(child))]


@pytest.mark.parametrize("name", [name for name, step in STEPS.items() if step.place])
def test_every_step_is_a_call_of_the_product(name: str) -> None:
    """Where the product has changed, `tools/chaos_steps` must change as well."""
    owner, attribute = chaos_hooks.find(STEPS[name].place)
    assert callable(getattr(owner, attribute))
