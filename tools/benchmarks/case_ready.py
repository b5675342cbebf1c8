"""A test that waits for servers in one of the ways, and tells how late it knew. Run by starts.py.

The servers answer after the delays of BENCH_PLAN, and write down when they began to listen.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness
from tools.benchmarks.processes import MILLISECONDS, python_program

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

_PLAN: dict[str, Any] = json.loads(os.environ["BENCH_PLAN"])
_FIELD_POLL_S = 0.5


def test_ready(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The first is not counted: what is imported late is imported by then."""
    late_ms = [
        _WAYS[_PLAN["way"]](request, tmp_path / f"time{number}", delay_s)
        for number, delay_s in enumerate([0.0, *_PLAN["delays_s"]])
    ]
    Path(_PLAN["result"]).write_text(json.dumps(late_ms[1:]), encoding="utf-8")


def _command(port: object, delay_s: float, path: Path) -> list[str]:
    return python_program("server_http.py", str(port), str(delay_s), str(path))


def _late_ms(path: Path) -> float:
    known = time.monotonic()
    return (known - float(path.read_text(encoding="ascii"))) * MILLISECONDS


def _harness(request: pytest.FixtureRequest, path: Path, delay_s: float) -> float:
    group: harness.ServerGroup = request.getfixturevalue("server_group")
    with group.launch(_command("{port}", delay_s, path), ready=harness.http_ok()) as server:
        server.wait_ready()
        return _late_ms(path)


def _xprocess(request: pytest.FixtureRequest, path: Path, delay_s: float) -> float:
    from xprocess import ProcessStarter  # noqa: PLC0415 - only this way needs it

    port = _free_port()

    class Starter(ProcessStarter):  # type: ignore[misc]  # the library has no types
        args = _command(port, delay_s, path)
        pattern = None
        terminate_on_interrupt = True

        def startup_check(self) -> bool:
            return _answers(port)

    fixture = request.getfixturevalue("xprocess")
    fixture.ensure(path.name, Starter)
    try:
        return _late_ms(path)
    finally:
        fixture.getinfo(path.name).terminate()


def _mirakuru(_request: pytest.FixtureRequest, path: Path, delay_s: float) -> float:
    from mirakuru import HTTPExecutor  # noqa: PLC0415 - only this way needs it

    port = _free_port()
    with HTTPExecutor(_command(port, delay_s, path), url=f"http://127.0.0.1:{port}/"):
        return _late_ms(path)


def _field(_request: pytest.FixtureRequest, path: Path, delay_s: float) -> float:
    port = _free_port()
    with subprocess.Popen(_command(port, delay_s, path)) as server:
        try:
            while not _answers(port):
                assert server.poll() is None
                time.sleep(_FIELD_POLL_S)
            return _late_ms(path)
        finally:
            server.terminate()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5.0) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


_WAYS: dict[str, Callable[[pytest.FixtureRequest, Path, float], float]] = {
    "harness": _harness,
    "pytest-xprocess": _xprocess,
    "mirakuru": _mirakuru,
    "one by one": _field,
}
