"""The program of tools/bench: runs the benchmarks, prints one table, exits with 1 if a figure is over its limit."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tools import (
    bench_crash,
    bench_figures,
    bench_handoff,
    bench_idle,
    bench_launch,
    bench_plugin,
    bench_scale,
    bench_stop,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_BENCHMARKS: dict[str, Callable[[bench_figures.Settings], list[bench_figures.Figure]]] = {
    "stop-8": bench_stop.stop_8,
    "stop-64": bench_stop.stop_64,
    "crash-8": bench_crash.crash_8,
    "launch": bench_launch.launch,
    "ready": bench_launch.ready,
    "plugin": bench_plugin.plugin,
    "idle": bench_idle.idle,
    "handoff": bench_handoff.handoff,
    "scale": bench_scale.scale,
}


def main() -> int:
    """Run what the command line asks for."""
    options = _options()
    found: list[bench_figures.Figure] = []
    with tempfile.TemporaryDirectory(prefix="harness-bench-") as scratch:
        settings = bench_figures.Settings(options.quick, Path(scratch))
        for name in options.names or _BENCHMARKS:
            found += _run(name, settings)
    print(bench_figures.table(found))
    if options.json is not None:
        _write(Path(options.started_in, options.json), found)
    return int(any(figure.is_over for figure in found))


def _options() -> argparse.Namespace:
    names = ", ".join(_BENCHMARKS)
    parser = argparse.ArgumentParser(prog="tools/bench", description="Exit status 1: some figure is over its limit.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"run only these, of {names}")
    parser.add_argument("--quick", action="store_true", help="repeat less: under a minute")
    parser.add_argument("--json", metavar="PATH", help="write every sample of every figure to PATH")
    parser.add_argument("--started-in", default=".", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in _BENCHMARKS]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]!r}: choose from {names}")
    return options


def _run(name: str, settings: bench_figures.Settings) -> list[bench_figures.Figure]:
    print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
    began = time.monotonic()
    found = _BENCHMARKS[name](settings)
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    return found


def _write(path: Path, found: Sequence[bench_figures.Figure]) -> None:
    path.write_text(json.dumps([asdict(figure) for figure in found], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
