"""Tests of which a benchmark needs some number. Run by helpers.py and plugins.py."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import harness


def test_trivial() -> None:
    assert True


@pytest.mark.parametrize("number", range(200))
def test_collects_garbage(number: int) -> None:
    assert gc.collect() >= 0, number


def test_tells_memory(watchdog: harness.Watchdog) -> None:
    memory = Path(f"/proc/{watchdog.pid}/smaps_rollup").read_text(encoding="utf-8")
    Path(os.environ["BENCH_MEMORY"]).write_text(memory, encoding="utf-8")
