"""A suite as one for vLLM is written: each test starts two inference servers, talks to both, and stops both."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools import llm_server

MODEL = os.environ["DEMO_LLM_MODEL"]
TOKENS = int(os.environ["DEMO_LLM_TOKENS"])
# Each answer that has begun is a file here, for the demo, which kills this suite when all have.
BEGUN = Path(os.environ["DEMO_LLM_BEGUN"])


def note_begin() -> None:
    (BEGUN / os.urandom(8).hex()).touch()


@pytest.mark.parametrize("number", range(2))
def test_two_servers_that_stream(number: int) -> None:
    with llm_server.pair(MODEL) as servers:
        answers = llm_server.chat_with_all(servers, TOKENS, note_begin)
    for server, answer in zip(servers, answers, strict=True):
        assert answer.finish_reason == "length"
        print(
            f"test {number}, {server.url_root}: the first of {len(answer.pieces)} pieces after {answer.first_s:.2f} s,"
        )
        print(f"  the last after {answer.last_s:.2f} s:{''.join(answer.pieces)}")
        assert server.server.outcome is not None
        print(f"  {server.server.outcome}", *server.server.outcome.gpu, sep="\n  ")
