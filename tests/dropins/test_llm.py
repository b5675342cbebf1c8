"""A real inference server, `transformers serve`, through the drop-in for vLLM's suite: streams, stops, and SIGKILL."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import processes
import pytest
from acceptance.conftest import record, state_dir

import harness
from tools import llm_server

if TYPE_CHECKING:
    from acceptance.recording import Record

__all__ = ["record", "state_dir"]

# A start is seconds of importing torch on a core, and there are more servers than cores.
pytestmark = pytest.mark.timeout(300)
READY_S = 240.0
GONE_S = 30.0
ROOT = Path(__file__).parents[2]
XDIST = [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", "--harness-strict"]

CONFTEST = f"""
import sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
"""
SUITE = """
import os
import pytest
from acceptance.recording import note, processes
from tools import llm_server

TOKENS = {tokens}

@pytest.mark.parametrize("number", range(2))
def test_two_servers(watchdog, number):
    with llm_server.pair({model!r}) as servers:
        for server in servers:
            people = [*server.server.pids(), processes.parent(server.proc.pid), watchdog.pid, os.getpid()]
            facts = {{"name": server.server.name, "pid": server.proc.pid, "ports": [server.port], "left": 0}}
            note("up", people=processes.identities(people), **facts)
        answers = llm_server.chat_with_all(servers, TOKENS, lambda: note("streaming"))
    for server in servers:
        note("down", pid=server.proc.pid)
    for answer in answers:
        assert answer.finish_reason == "length"
        assert len("".join(answer.pieces).split()) == TOKENS
        assert len(answer.pieces) > 1
    assert [server.server.outcome.how for server in servers] == ["asked", "asked"]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give a model's directory; skips where there is nothing to serve it with."""
    if reason := llm_server.missing():
        pytest.skip(reason)
    return llm_server.make_model(tmp_path_factory.mktemp("llm") / "tiny-llm")


def write_suite(pytester: pytest.Pytester, model: str, tokens: int) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(SUITE.format(model=model, tokens=tokens))


def test_streamed_chats_of_two_servers_in_each_worker(pytester: pytest.Pytester, record: Record, model: str) -> None:
    write_suite(pytester, model, tokens=40)
    result = pytester.run(*XDIST, timeout=READY_S)
    result.assert_outcomes(passed=2)
    assert len(record.notes("streaming")) == 4
    assert len({up.client for up in record.check(servers=4)}) == 2


def test_sigkill_of_the_run_while_its_servers_stream(pytester: pytest.Pytester, record: Record, model: str) -> None:
    write_suite(pytester, model, tokens=60_000)  # it takes minutes, and nobody waits for its end
    output = pytester.path / "output"
    with output.open("w", encoding="utf-8") as file:
        run = pytester.popen(XDIST, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    def is_streaming() -> bool:
        assert run.poll() is None, output.read_text(encoding="utf-8")
        return len(record.notes("streaming")) == 4

    processes.wait_for(is_streaming, READY_S, "four servers stream")
    os.killpg(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert len({up.client for up in record.check(servers=4, timeout_s=GONE_S)}) == 2


def test_a_model_that_was_copied_in_half(model: str, own: harness.Watchdog, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = broken / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(harness.ServerExited, match="safetensors") as caught:
        llm_server.TransformersServer(str(broken))
    assert caught.value.returncode == 1
    assert "Error" in caught.value.log_tail
    (server,) = own.servers
    assert server.has_ended
    assert server.outcome is not None
    assert server.outcome.how == "exited"
