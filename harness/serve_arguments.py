"""What the drop-in for vLLM's suite needs to know of the arguments of `vllm serve`. Pure.

vLLM's own parser is not asked, since that takes an import of vLLM, some seconds long: an argument that is wrong is
reported by the server, with its log.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from harness.errors import SpecError
from harness.specs import Arguments, without_locals

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# vLLM's default.
_PORT = 8000
_LOCAL_HOST = "127.0.0.1"
# What a request is sent to where a server listens on all addresses.
_ANY = {"0.0.0.0": _LOCAL_HOST, "": _LOCAL_HOST, "::": "::1"}  # noqa: S104 - nothing is bound to it


@dataclass(frozen=True)
class ServeArguments:
    """What arguments say of a server. `host` and `port` are None where it listens on a socket file, `uds`.

    `deployment` is where the nodes of its data-parallel deployment meet, as they name it (address and port, None for
    vLLM's own), and None for a server that is none of several nodes. `shutdown_timeout_s` is vLLM's --shutdown-timeout.
    """

    host: str | None
    port: int | None
    uds: str | None
    is_headless: bool
    deployment: tuple[str | None, str | None] | None
    shutdown_timeout_s: float
    shows_hidden_metrics: bool

    @property
    def connect_to(self) -> str:
        """Give the host that a connection is made to."""
        return _ANY.get(self.host or "", self.host or _LOCAL_HOST)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SpecError(f"the server's arguments: {message}")


def _parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int, default=_PORT)
    parser.add_argument("--uds")
    parser.add_argument("--headless", action="store_true")
    parser.add_argument("--shutdown-timeout", type=float, default=0.0)
    parser.add_argument("--show-hidden-metrics-for-version")
    # With the short forms of the others: argparse would take "-dp" for the beginning of one of them.
    parser.add_argument("--data-parallel-size", "-dp")
    parser.add_argument("--data-parallel-address", "-dpa")
    parser.add_argument("--data-parallel-rpc-port", "-dpp")
    parser.add_argument("--data-parallel-rank", "-dpn")
    parser.add_argument("--data-parallel-start-rank", "-dpr")
    parser.add_argument("--data-parallel-size-local", "-dpl")
    return parser


@without_locals
def read(arguments: Sequence[str]) -> ServeArguments:
    """Read them; raises SpecError if one of those that count here has a value that it cannot have."""
    normal = [_normal(argument) for argument in arguments]
    found, _ = _parser().parse_known_args(normal)
    if not 0 < found.port < 1 << 16:
        raise SpecError(f"the server's arguments: --port must be from 1 to 65535, not {found.port}")
    return ServeArguments(
        host=None if found.uds else str(found.host or _LOCAL_HOST),
        port=None if found.uds else found.port,
        uds=found.uds or None,
        is_headless=found.headless,
        deployment=_deployment(found),
        shutdown_timeout_s=max(0.0, found.shutdown_timeout),
        shows_hidden_metrics=found.show_hidden_metrics_for_version is not None,
    )


def _deployment(found: argparse.Namespace) -> tuple[str | None, str | None] | None:
    place = (found.data_parallel_address, found.data_parallel_rpc_port)
    node = (found.data_parallel_rank, found.data_parallel_start_rank, found.data_parallel_size_local)
    return place if found.headless or any(value is not None for value in (*place, *node)) else None


def _normal(argument: str) -> str:
    # vLLM takes --shutdown_timeout for --shutdown-timeout.
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def names(arguments: Sequence[str], *options: str) -> bool:
    """Say whether one of these options is among the arguments."""
    return any(_normal(argument).partition("=")[0] in options for argument in arguments)


def completed(
    arguments: Sequence[str], *, port: int | None, seed: int | None, hf_overrides: Mapping[str, object] | None
) -> list[str]:
    """Give the arguments with a port, a seed and overrides of a model's configuration; raises SpecError for a second.

    `port` is None where the arguments name it, or the server listens on a socket file.
    """
    more: list[str] = []
    if port is not None:
        more += ["--port", str(port)]
    if seed is not None:
        if names(arguments, "--seed"):
            raise SpecError(f"You have manually specified the seed when `seed={seed}`.")
        more += ["--seed", str(seed)]
    if hf_overrides is not None:
        more += ["--hf-overrides", json.dumps(hf_overrides)]
    return Arguments([*arguments, *more])
