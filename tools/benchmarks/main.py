"""The program of tools/bench: runs the benchmarks side by side, and prints one table.

Exit status 1: a row is over its limit, and no reason is known; with --quick: a ratio to the limit is over its bound.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import resource
import signal
import sys
import tempfile
import time
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pynvml

from tools.benchmarks import crashes, gpus, handoffs, helpers, plugins, rows, scales, starts, stops

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_BENCHMARKS: dict[str, Callable[[rows.Settings], list[rows.Row]]] = {
    "stop-1": stops.stop_1,
    "stop-8": stops.stop_8,
    "stop-64": stops.stop_64,
    "trees": stops.trees,
    "crashes": crashes.crashes,
    "launch": starts.launch,
    "ready": starts.ready,
    "plugin": plugins.plugin,
    "helpers": helpers.helpers,
    "handoff": handoffs.handoff,
    "scale": scales.scale,
}
_ON_GPUS = {"gpu-stop": gpus.stop, "gpu-suite": gpus.suite}
_LIBRARIES = ("pytest", "pytest-xdist", "pytest-xprocess", "mirakuru", "psutil", "filelock")
_MODULES = {"pytest-xdist": "xdist", "pytest-xprocess": "xprocess"}


def main() -> int:
    """Run what the command line asks for."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is being measured is ended
    # A pidfd for each process that is watched.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    found: list[rows.Row] = []
    with tempfile.TemporaryDirectory(prefix="harness-bench-") as scratch:
        settings = rows.Settings(options.quick, Path(scratch))
        for name in options.names or [name for name in _BENCHMARKS if not options.quick or name != "ready"]:
            found += _run(name, settings)
            _write(options, found)  # each time: it takes half an hour, and may be stopped
    if options.quick:
        print(rows.guards(found))
        return int(any(row.is_broken for row in found))
    print(rows.table(found))
    return int(any(row.judgement == "OVER" for row in found))


def _options() -> argparse.Namespace:
    names = f"{', '.join(_BENCHMARKS)}; only if they are named, {', '.join(_ON_GPUS)}, which need a GPU"
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"run only these, of {names}")
    parser.add_argument("--quick", action="store_true", help="guard the ratios to the limits, in less than a minute")
    parser.add_argument("--json", metavar="PATH", help="write every sample to PATH")
    parser.add_argument("--markdown", metavar="PATH", help="write the table to PATH, with lowest and highest")
    parser.add_argument("--started-in", default=".", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in {**_BENCHMARKS, **_ON_GPUS}]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]!r}: choose from {names}")
    return options


def _run(name: str, settings: rows.Settings) -> list[rows.Row]:
    print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
    began = time.monotonic()
    found = {**_BENCHMARKS, **_ON_GPUS}[name](settings)
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    return found


def about() -> dict[str, Any]:
    """Say when and where this was measured."""
    versions = {name: metadata.version(name) for name in _LIBRARIES if util.find_spec(_MODULES.get(name, name))}
    cores = len(os.sched_getaffinity(0))
    system = {"system": f"{platform.system()} {platform.release()}", "machine": platform.machine(), "cores": cores}
    now = dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return {"date": now, **system, **_gpu(), "python": platform.python_version(), "versions": versions}


def _gpu() -> dict[str, str]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {}
    name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
    return {"gpu": f"{name}, driver {pynvml.nvmlSystemGetDriverVersion()}"}


def _write(options: argparse.Namespace, found: Sequence[rows.Row]) -> None:
    if options.json is None and options.markdown is None:
        return
    where = about()
    if options.json is not None:
        content = {"about": where, "rows": [row.as_json() for row in found]}
        Path(options.started_in, options.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.markdown is not None:
        versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
        machine = f"{where['system']} {where['machine']}, {where['cores']} cores, {where.get('gpu', 'no GPU')}"
        place = f"{machine}, Python {where['python']}"
        text = f"Measured {where['date']}: {place}; {versions}.\n\n{rows.markdown(found)}\n"
        Path(options.started_in, options.markdown).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
