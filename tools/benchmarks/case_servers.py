"""A test that starts servers in one of the ways, tells which processes they are, and stops them or waits to be killed.

Run by runs.py: what it is to do is in BENCH_PLAN, and what it tells are lines of the file BENCH_TOLD.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tools.benchmarks.processes import Ends, python_program
from tools.benchmarks.ways import WAYS

if TYPE_CHECKING:
    from tools.benchmarks.ways import Way

_PLAN: dict[str, Any] = json.loads(os.environ["BENCH_PLAN"])
_WAITS_S = 600.0
_READY_S = 60.0


def _tell(content: object) -> None:
    with open(os.environ["BENCH_TOLD"], "a", encoding="ascii") as told:
        told.write(json.dumps(content) + "\n")


@pytest.fixture(autouse=True)
def began() -> float:
    """Give when the setup of the test began; its deadline counts from there."""
    return time.monotonic()


@pytest.fixture
def way(request: pytest.FixtureRequest, began: float) -> Way:
    del began
    return WAYS[_PLAN["way"]](request, _PLAN["grace_s"])


@pytest.mark.parametrize("test", range(_PLAN["tests"]))
def test_servers(way: Way, began: float, tmp_path: Path, test: int) -> None:
    assert test < _PLAN["tests"]
    paths = [tmp_path / f"server{number}" for number in range(_PLAN["count"])]
    for number, path in enumerate(paths):
        way.start(_command(number, path), path)
    pids = [pid for path in paths for pid in _pids(path)]
    _tell({"test": os.getpid(), "began": began, "pids": pids})
    _wait_until_seen()
    if _PLAN["then"] == "wait":
        time.sleep(_WAITS_S)
    time.sleep(_PLAN["uses_s"])
    way.prepare()
    with contextlib.closing(Ends(pids)) as ends:
        called = time.monotonic()
        way.stop()
        returned = time.monotonic()
        _tell({"took_s": returned - called, "returned": returned, "left": ends.left()})


def _wait_until_seen() -> None:
    """Wait until the driver has a hold of the processes, if one looks on."""
    seen = Path(f"{os.environ['BENCH_TOLD']}.seen")
    deadline = time.monotonic() + _READY_S
    while _PLAN["is_watched"] and not seen.exists():
        assert time.monotonic() < deadline, "nobody looks on"
        time.sleep(0.005)


def _command(number: int, path: Path) -> list[str]:
    options = [*_PLAN["options"], *(["ignore"] if _PLAN["ignores"] and number == 0 else [])]
    return python_program("server_tree.py", str(_PLAN["stop_s"]), str(path), *options)


def _pids(path: Path) -> list[int]:
    deadline = time.monotonic() + _READY_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} does not get ready"
        time.sleep(0.005)
    found: list[int] = json.loads(path.read_bytes())
    return found
