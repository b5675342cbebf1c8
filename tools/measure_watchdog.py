"""Measures which lines of the harness a watchdog, its keepers and its broker run, for a fraction of coverage's cost.

A test run starts hundreds of watchdogs, and coverage's start takes 0.2 s of CPU in each, its end 0.05 s in each keeper:
three quarters of the run's time. This uses the same tracer, coverage's own, without the rest of coverage, and leaves
what that has collected in a file; `measure_merge` makes coverage data of all of them.

`tools/test` writes a .pth file into .venv that runs this file in each of them, before coverage's own .pth file.
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

_BOOTS = tuple(os.path.join("harness", process, "boot.py") for process in ("watchdog", "broker"))
_IS_MEASURED = "_harness_is_measured"


class _Measurement:
    """What this process, and those that it forks, have run."""

    def __init__(self, tracer_path: str, package: str, directory: str) -> None:
        self._package = package
        self._directory = directory
        self._native = _load("coverage.tracer", tracer_path)
        self._data = dict[str, set[int]]()

    def _new_tracer(self) -> Any:
        tracer = self._native.CTracer()
        tracer.data = self._data
        tracer.trace_arcs = True
        tracer.should_trace = self._should_trace
        tracer.should_trace_cache = {}
        tracer.warn = tracer.lock_data = tracer.unlock_data = lambda *_arguments: None
        tracer.file_tracers = {}
        # As coverage's collector sets them where there is no plugin.
        for name in ("concur_id_func", "check_include", "should_start_context", "switch_context", "disable_plugin"):
            setattr(tracer, name, None)
        return tracer

    def start(self) -> None:
        os._exit = self._saving(os._exit)
        os.execv = self._saving(os.execv)
        os.execve = self._saving(os.execve)
        self._new_tracer().start()

    def start_in_threads(self) -> None:
        import threading  # noqa: PLC0415 - a watchdog has no thread, and does without

        threading.settrace(self._start_in_thread)

    def _start_in_thread(self, frame: Any, event: str, argument: Any) -> Any:
        # As coverage's collector does it: each thread has a tracer of its own.
        sys.settrace(None)
        return self._new_tracer().start()(frame, event, argument)

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
        data = marshal.dumps({filename: list(arcs) for filename, arcs in list(self._data.items())})
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
    """Measure this process, if it is a watchdog or a broker in a measured run."""
    tracer, directory = os.environ.get("COVERAGE_WATCHDOG_TRACER"), os.environ.get("COVERAGE_WATCHDOG_DIRECTORY")
    program = next((argument for argument in sys.orig_argv if argument.endswith(_BOOTS)), None)
    # This file is run once more where lib64 is a link to lib.
    if program is None or tracer is None or directory is None or hasattr(sys, _IS_MEASURED):
        return
    setattr(sys, _IS_MEASURED, True)
    for name in ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG"):
        os.environ.pop(name, None)  # coverage's .pth file comes next: it may not start
    measurement = _Measurement(tracer, os.path.dirname(os.path.dirname(program)) + os.sep, directory)
    if program.endswith(_BOOTS[1]):
        measurement.start_in_threads()
    measurement.start()


main()
