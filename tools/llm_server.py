"""`transformers serve` on the tiny model of `llm_model`: what the tests and the demo start, as suites start vLLM.

HARNESS_LLM_PYTHON names an interpreter that has transformers, where this one has not. HARNESS_LLM_DEVICE is where the
model goes, "cpu" if nothing is said, and HARNESS_LLM_GPU_MIB what each server leases of a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from harness.vllm import RemoteOpenAIServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PYTHON = sys.executable if importlib.util.find_spec("transformers") else os.environ.get("HARNESS_LLM_PYTHON", "")
_ROOT = Path(__file__).resolve().parents[1]
_HAS_TRANSFORMERS = "import importlib.util, sys; sys.exit(importlib.util.find_spec('transformers') is None)"


class TransformersServer(RemoteOpenAIServer):
    """A server of an OpenAI-compatible API. Nothing is looked up at a hub."""

    command = (PYTHON, "-m", "transformers.cli.transformers", "serve")

    def __init__(self, model: str) -> None:
        """Start it, and wait until it is ready."""
        arguments = ["--device", os.environ.get("HARNESS_LLM_DEVICE", "cpu")]
        # One thread each: the servers share the cores, and torch's threads wait for one another by spinning.
        environment = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        mib = int(os.environ.get("HARNESS_LLM_GPU_MIB", "0")) or None
        self.model = model
        super().__init__(model, arguments, seed=None, env_dict=environment, gpu_memory_mib=mib)  # it knows no --seed

    def chat(self, tokens: int, begun: Callable[[], object] = lambda: None) -> Answer:
        """Have an answer of so many tokens streamed; `begun` is called when its first piece is here."""
        pieces: list[tuple[float, str]] = []
        reason = None
        with self.get_client() as client:
            started = time.monotonic()
            for chunk in client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": "Hello!"}], max_tokens=tokens, stream=True
            ):
                reason = chunk.choices[0].finish_reason
                if chunk.choices[0].delta.content:
                    pieces.append((time.monotonic() - started, chunk.choices[0].delta.content))
                    if len(pieces) == 1:
                        begun()
        return Answer([text for _, text in pieces], reason, pieces[0][0], pieces[-1][0])


class Answer(NamedTuple):
    """A chat completion as it came: its pieces, why it ended, and after how many seconds the first and last came."""

    pieces: list[str]
    finish_reason: str | None
    first_s: float
    last_s: float


def missing() -> str:
    """Say why no server can be started here, "" if one can be."""
    if importlib.util.find_spec("openai") is None:
        return "the client is missing: pip install openai"
    if not PYTHON:
        return "no transformers here, and HARNESS_LLM_PYTHON names no Python that has it"
    try:
        code = subprocess.run([PYTHON, "-c", _HAS_TRANSFORMERS], check=False, capture_output=True).returncode
    except OSError as error:
        return f"HARNESS_LLM_PYTHON={PYTHON}: {error.strerror}"
    return f"{PYTHON} has no transformers" if code else ""


def make_model(directory: Path) -> str:
    """Save the model in this directory, and give its name for a server."""
    subprocess.run([PYTHON, "-m", "tools.llm_model", str(directory)], cwd=_ROOT, check=True)
    return str(directory)


@contextlib.contextmanager
def pair(model: str) -> Iterator[list[TransformersServer]]:
    """Give two servers that were started side by side; they are stopped side by side."""
    servers: list[TransformersServer] = []
    try:
        with ThreadPoolExecutor(2) as pool:
            for started in [pool.submit(lambda: servers.append(TransformersServer(model))) for _ in range(2)]:
                started.result()
        yield servers
    finally:
        TransformersServer.shutdown_many(servers)


def chat_with_all(
    servers: list[TransformersServer], tokens: int, begun: Callable[[], object] = lambda: None
) -> list[Answer]:
    """Have each server stream an answer, all at the same time."""
    with ThreadPoolExecutor(len(servers)) as pool:
        return list(pool.map(lambda server: server.chat(tokens, begun), servers))
