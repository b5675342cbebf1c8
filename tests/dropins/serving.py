"""The drop-in's classes with programs of these tests in the place of vLLM."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, ClassVar

from servers.commands import FOLDER

from harness.vllm import RemoteOpenAIServer

if TYPE_CHECKING:
    from collections.abc import Sequence


def program(name: str) -> list[str]:
    """Give the command of a program in tests/servers."""
    return [sys.executable, "-I", "-S", str(FOLDER / name)]


class Server(RemoteOpenAIServer):
    """A server with processes like vLLM's."""

    command: ClassVar[Sequence[str]] = [*program("vllm_serve.py"), "serve"]


class Plain(RemoteOpenAIServer):
    """A single process that answers, for what has nothing to do with vLLM's processes."""

    command: ClassVar[Sequence[str]] = [sys.executable, "-I", "-S", str(FOLDER / "plain_serve.py")]
