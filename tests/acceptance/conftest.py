"""Fixtures of the acceptance tests: pytest runs with a state directory of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from faults.conftest import bystander, start_run

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["bystander", "start_run"]


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the state of the runs in the test's own directory."""
    path = tmp_path / "state"
    monkeypatch.setenv("HARNESS_STATE_DIR", str(path))
    return path
