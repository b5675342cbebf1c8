"""Measures which lines of the harness a watchdog and its keepers run, for a fraction of what coverage costs there.

A test run starts hundreds of watchdogs, and coverage's start takes 0.2 s of CPU in each, its end 0.05 s in each keeper:
three quarters of the run's time. This uses the same tracer, coverage's own, without the rest of coverage, and leaves
what that has collected in a file; `measure_merge` makes coverage data of all of them.

`tools/test` writes a .pth file into .venv that runs this file in each watchdog, before coverage's own .pth file.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import marshal
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_BOOT = os.path.join("harness", "watchdog", "boot.py")


class _Measurement:
    """What this process, and those that it forks, have run."""

    def __init__(self, tracer_path: str, package: str, directory: str) -> None:
        self._package = package
        self._directory = directory
        self._native = _load("coverage.tracer", tracer_path)
        self._tracer = self._native.CTracer()
        self._tracer.data = self._data = dict[str, set[int]]()
        self._tracer.trace_arcs = True
        self._tracer.should_trace = self._should_trace
        self._tracer.should_trace_cache = {}
        self._tracer.warn = self._tracer.lock_data = self._tracer.unlock_data = lambda *_arguments: None
        self._tracer.file_tracers = {}
        # As coverage's collector sets them where there is one thread and no plugin.
        for name in ("concur_id_func", "check_include", "should_start_context", "switch_context", "disable_plugin"):
            setattr(self._tracer, name, None)

    def start(self) -> None:
        os._exit = self._saving(os._exit)
        os.execv = self._saving(os.execv)
        os.execve = self._saving(os.execve)
        self._tracer.start()

    def _should_trace(self, filename: str, _frame: object) -> Any:
        found = self._native.CFileDisposition()
        found.original_filename = found.canonical_filename = found.source_filename = filename
        found.trace = filename.startswith(self._package)
        found.reason, found.file_tracer, found.has_dynamic_filename = "", None, False
        return found

    def _saving(self, end: Callable[..., Any]) -> Callable[..., Any]:
        def save_and_end(*arguments: Any) -> Any:
            self._save()
            return end(*arguments)

        return save_and_end

    def _save(self) -> None:
        path = os.path.join(self._directory, f"{os.getpid()}-{time.monotonic_ns()}")
        data = marshal.dumps({filename: list(arcs) for filename, arcs in self._data.items()})
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(descriptor, data)
            os.close(descriptor)
        except OSError:
            return  # a test has taken away descriptors or the disk


def _load(name: str, path: str) -> Any:
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    spec = importlib.util.spec_from_loader(name, loader)
    if spec is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def main() -> None:
    """Measure this process, if it is a watchdog in a measured run."""
    tracer, directory = os.environ.get("COVERAGE_WATCHDOG_TRACER"), os.environ.get("COVERAGE_WATCHDOG_DIRECTORY")
    program = next((argument for argument in sys.orig_argv if argument.endswith(_BOOT)), None)
    if program is None or tracer is None or directory is None:
        return
    # Coverage's .pth file comes next, and this file once more where lib64 is a link to lib: neither may start.
    for name in ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG", "COVERAGE_WATCHDOG_TRACER"):
        os.environ.pop(name, None)
    _Measurement(tracer, program[: -len(os.path.join("watchdog", "boot.py"))], directory).start()


main()
