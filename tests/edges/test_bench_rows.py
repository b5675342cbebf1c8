"""How `tools/bench` judges what it has measured."""

from __future__ import annotations

import json
import math

import pytest

from tools.benchmarks import rows
from tools.benchmarks.rows import Row


def row(ours: list[float], limit: list[float], *, unit: str = "ms", bound: float = 2.0, reason: str = "") -> Row:
    return Row("stop", unit, {"harness": ours, "limit": limit}, "a kill by hand", bound, reason)


@pytest.mark.parametrize(
    ("ours", "limit", "unit", "is_over"),
    [
        (115.0, 100.0, "ms", False),  # 1.05 times, and 10 ms
        (115.1, 100.0, "ms", True),
        (1.06, 1.0, "s", False),
        (1.061, 1.0, "s", True),
        (10.0, 0.0, "ms", False),
        (0.0, 0.0, "processes", False),
        (1.0, 0.0, "processes", True),  # of what is left there is no allowance
        (1.06, 1.0, "MiB", True),
        (math.inf, 1.0, "s", True),
    ],
)
def test_it_may_take_little_more_than_the_limit(ours: float, limit: float, unit: str, *, is_over: bool) -> None:
    assert row([ours], [limit], unit=unit).is_over is is_over


def test_the_median_is_judged() -> None:
    assert not row([1.0, 1.0, 500.0], [1.0, 1.0, 0.0]).is_over
    assert row([1.0, 500.0, 500.0], [1.0]).is_over


def test_over_the_limit_is_a_failure_unless_a_reason_is_known() -> None:
    assert row([100.0], [1.0]).judgement == "OVER"
    assert row([100.0], [1.0], reason="two forks").judgement == "noted"
    assert row([1.0], [1.0], reason="two forks").judgement == "within"


@pytest.mark.parametrize(
    ("ours", "limit", "bound", "is_broken"),
    [
        (2.0, 1.0, 2.0, False),
        (2.1, 1.0, 2.0, True),
        (0.0, 0.0, 2.0, False),
        (1.0, 0.0, 2.0, True),  # a limit of nothing is exact
        (9e9, 1.0, math.inf, False),
        (1.0, 0.0, math.inf, False),
    ],
)
def test_the_guard_is_a_ratio(ours: float, limit: float, bound: float, *, is_broken: bool) -> None:
    assert row([ours], [limit], bound=bound).is_broken is is_broken


def test_the_table_has_median_lowest_highest_and_what_never_came() -> None:
    measured = Row(
        "stop", "ms", {"harness": [3.0, 1.0, 2.0], "limit": [1.0], "mirakuru": [math.inf]}, "a kill", 2.0, "two forks"
    )
    table = rows.markdown([measured]).splitlines()
    assert table[0] == "|  | harness | limit | mirakuru | at most |  |"
    assert table[2] == "| stop, ms | 2 (1..3) | 1 | never | 11.1 | within |"
    assert table[-1] == "- The limit of stop: a kill."
    assert rows.table([measured]).splitlines()[1].split() == ["stop,", "ms", "2", "1", "never", "11.1", "within"]
    assert rows.guards([measured]).splitlines()[1].split() == ["stop,", "ms", "2", "1", "2", "ok"]


def test_a_reason_stands_below_the_table_of_what_is_over() -> None:
    found = rows.markdown([row([100.0], [1.0], reason="two forks"), row([200.0], [1.0], reason="two forks")])
    assert found.splitlines()[-1] == "- Over the limit, stop; stop: two forks."


def test_a_note_says_how_much_was_measured_apart() -> None:
    one = Row("stop", "ms", {"harness": [100.0], "limit": [1.0]}, "a kill", 2.0, "two forks take 40 ms.", 40.0)
    assert one.note == "two forks take 40 ms. Measured apart that is 40 ms; it takes 99 ms more than the limit"


def test_what_grows_may_grow_in_proportion() -> None:
    samples = {"harness": [1.5], "limit": [1.0]}
    assert not Row("stop of each", "ms each", samples, "the same for few", 2.0, factor=1.5).is_over
    assert Row("stop of each", "ms each", samples, "the same for few", 2.0, factor=1.4).is_over


def test_json_has_every_sample_and_null_for_never() -> None:
    content = row([1.0, math.inf], [1.0]).as_json()
    assert json.loads(json.dumps(content, allow_nan=False))["samples"] == {"harness": [1.0, None], "limit": [1.0]}


def test_an_infinite_time_is_allowed_nowhere_in_json() -> None:
    content = row([math.inf], [math.inf]).as_json()
    assert json.loads(json.dumps(content, allow_nan=False))["most"] is None
