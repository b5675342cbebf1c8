"""The demo with real inference servers: the suite in demo_llm under `pytest -n 2`, and then killed while they stream.

Usage: python -m tools.demo_llm_run [--device cuda] [--gpu-memory-mib N]     with cuda, each server leases a share
Nothing is downloaded. It runs as well where the project is not installed, on a machine with GPUs and no network.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pynvml

from harness import report_command
from tools import demo_run, llm_server
from tools.gpu_processes import plugin_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from harness.reporting.summary import Timed

SUITE = Path(__file__).with_name("demo_llm")
SERVERS = 4
# A start takes seconds of a core; on two cores four of them take half a minute.
READY_S = 300.0
# A CUDA context with the libraries' own buffers; the model is nothing beside that.
GPU_MIB = 2048


def main() -> int:
    options = arguments()
    if reason := llm_server.missing():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as name, plugin_environment(**settings(options, Path(name))) as environment:
        Path(name, "begun").mkdir()
        llm_server.make_model(Path(name, "tiny-llm"))
        code = show_a_run(environment, Path(name, "report.jsonl"))
        left = kill_a_run(environment, Path(name, "begun"), gpu_memory if options.gpu_memory_mib else list)
        return 1 if code or left else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_llm_run", description="real inference servers")
    parser.add_argument("--device", default="cpu", help="what `transformers serve --device` takes; cuda: with leases")
    parser.add_argument(
        "--gpu-memory-mib", type=int, help=f"what each server leases of a GPU ({GPU_MIB}; with cpu, none)"
    )
    options = parser.parse_args()
    if options.gpu_memory_mib is None:
        options.gpu_memory_mib = 0 if options.device == "cpu" else GPU_MIB
    return options


def settings(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    return {
        "HARNESS_LLM_DEVICE": options.device,
        "HARNESS_LLM_GPU_MIB": str(options.gpu_memory_mib),
        "DEMO_LLM_MODEL": str(folder / "tiny-llm"),
        "DEMO_LLM_BEGUN": str(folder / "begun"),
        "DEMO_LLM_TOKENS": "40",
    }


def show_a_run(environment: dict[str, str], report: Path) -> int:
    demo_run.title("1. Two pytest workers, each with two servers (transformers serve), which stream chat completions")
    suite = demo_run.Suite(SUITE, SERVERS, "", environment=environment)
    code = demo_run.run_to_its_end(suite, "-rP", f"--harness-report={report}")
    summary = report_command.read(str(report))
    print(f"\nOf {summary.launched} servers: start (until ready) {times(summary.starts)}; stop {times(summary.stops)}")
    return code


def times(measured: Sequence[Timed]) -> str:
    seconds = [timed.seconds for timed in measured]
    if not seconds:
        return "none"
    return f"{statistics.median(seconds):.2f} s (median; {min(seconds):.2f} to {max(seconds):.2f})"


def kill_a_run(environment: dict[str, str], begun: Path, facts: Callable[[], list[str]]) -> int:
    demo_run.title("2. The same suite, and pytest and both workers killed with SIGKILL while all four servers stream")
    for earlier in begun.iterdir():
        earlier.unlink()
    suite = demo_run.Suite(
        SUITE,
        SERVERS,
        "a server waits for its open streams; these ended with the clients, so that no grace was used up",
        timeout_s=READY_S,
        # Answers that take minutes.
        environment={**environment, "DEMO_LLM_TOKENS": "60000"},
        is_at_work=lambda: len(os.listdir(begun)) == SERVERS,
        facts=facts,
    )
    return demo_run.kill_in_the_middle(suite)


def gpu_memory() -> list[str]:
    """Say of each device what is in use now."""
    pynvml.nvmlInit()
    devices = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    used = [pynvml.nvmlDeviceGetMemoryInfo(device, version=pynvml.nvmlMemory_v2).used >> 20 for device in devices]
    return [f"  GPU {index}: {mib} MiB in use" for index, mib in enumerate(used)]


if __name__ == "__main__":
    raise SystemExit(main())
