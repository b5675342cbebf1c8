"""Fixtures of the acceptance tests: pytest runs with a state directory of their own."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

import processes
import pytest
from acceptance.recording import CONFTEST, PATH, Record
from faults.conftest import bystander, start_run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["bystander", "start_run"]


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the state of the runs in the test's own directory."""
    path = tmp_path / "state"
    monkeypatch.setenv("HARNESS_STATE_DIR", str(path))
    return path


@pytest.fixture
def record(pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Record]:
    """Give what pytester's runs write down about their servers; a run that a failed test has left is killed."""
    path = tmp_path / "record"
    monkeypatch.setenv(PATH, str(path))
    pytester.makeconftest(CONFTEST)
    yield Record(path)
    for pid in processes.marked(f"{PATH}={path}"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
