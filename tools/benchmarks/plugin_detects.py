"""A pytest plugin: the controller of pytest-xdist tells when it knows that a worker is gone. Loaded by crashes.py."""

from __future__ import annotations

import json
import os
import time

import pytest


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_testnodedown(node: object, error: object) -> None:
    """Tell."""
    del node, error
    detected = time.monotonic()
    with open(os.environ["BENCH_TOLD"], "a", encoding="ascii") as told:
        told.write(json.dumps({"detected": detected}) + "\n")
