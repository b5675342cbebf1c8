"""A server that holds memory on every GPU that it sees: for real through CUDA's driver, or in the stand-in's files.

It answers GET /health with 200 once it holds the memory. At SIGTERM it asks its children at once as well.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_MIB = 1 << 20
_CHUNK_MIB = 1024


class StandinDevices:
    """Memory in the stand-in's files, which counts as long as this process lives."""

    def __init__(self, linger_ms: int, *, is_listed: bool) -> None:
        self._linger_ms = linger_ms
        self._is_listed = is_listed
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        folder = Path(os.environ["STANDIN_NVML"]) / "holds"
        start = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
        self._start = start
        self._paths = [folder / f"{uuid}.{os.getpid()}" for uuid in visible.split(",") if uuid]

    def hold(self, mib: int, _pinned_mib: int) -> None:
        for path in self._paths:
            # With one step: a half-written file would be a half-known process.
            fresh = path.with_name(f"fresh.{path.name}")
            fresh.write_text(f"{mib} c {self._start} {self._linger_ms} {int(self._is_listed)}", encoding="utf-8")
            fresh.rename(path)

    def free(self) -> None:
        for path in self._paths:
            path.unlink(missing_ok=True)


class CudaDevices:
    """Memory by cuMemAlloc, and pinned host memory by cuMemHostAlloc; source: CUDA Driver API."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._devices: list[ctypes.c_int] = []

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            raise RuntimeError(f"{name}: CUDA error {code}")

    def hold(self, mib: int, pinned_mib: int) -> None:
        self._call("cuInit", ctypes.c_uint(0))
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        for ordinal in range(count.value):
            self._hold_on(ordinal, mib)
        if pinned_mib:
            self._pin(pinned_mib)

    def _hold_on(self, ordinal: int, mib: int) -> None:
        device = ctypes.c_int()
        context = ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._devices.append(device)
        left = mib
        while left > 0:
            size = ctypes.c_size_t(min(left, _CHUNK_MIB) * _MIB)
            pointer = ctypes.c_uint64()
            self._call("cuMemAlloc_v2", ctypes.byref(pointer), size)
            self._call("cuMemsetD8_v2", pointer, ctypes.c_ubyte(1), size)
            left -= _CHUNK_MIB
        self._call("cuCtxSynchronize")

    def _pin(self, mib: int) -> None:
        left = mib
        while left > 0:
            size = ctypes.c_size_t(min(left, _CHUNK_MIB) * _MIB)
            pointer = ctypes.c_void_p()
            self._call("cuMemHostAlloc", ctypes.byref(pointer), size, ctypes.c_uint(0))
            ctypes.memset(pointer.value or 0, 1, size.value)
            left -= _CHUNK_MIB

    def free(self) -> None:
        for device in self._devices:
            self._call("cuDevicePrimaryCtxReset_v2", device)


class Health(BaseHTTPRequestHandler):
    """Answers /health."""

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def main() -> None:
    """Hold memory until a signal comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=100, help="on each device")
    parser.add_argument("--pinned-mib", type=int, default=0, help="of pinned host memory (CUDA only)")
    parser.add_argument("--on-term", default="exit", help="exit, ignore, or free-then-linger:SECONDS")
    parser.add_argument("--children", type=int, default=0, help="processes of its own that hold as much each")
    parser.add_argument("--port", type=int, help="for /health, on 127.0.0.1")
    parser.add_argument("--backend", choices=["auto", "standin", "cuda"], default="auto", help="auto: by STANDIN_NVML")
    parser.add_argument("--say", action="store_true", help='print "held" once it holds the memory')
    parser.add_argument(
        "--linger-ms", type=int, default=0, help="its memory stays so long after its end (stand-in only)"
    )
    parser.add_argument("--listed", action="store_true", help="in which it is listed (stand-in only)")
    options = parser.parse_args()
    is_standin = options.backend == "standin" or (options.backend == "auto" and "STANDIN_NVML" in os.environ)
    devices = StandinDevices(options.linger_ms, is_listed=options.listed) if is_standin else CudaDevices()
    stop = threading.Event()
    # Python's handlers run in the main thread, which waits below: for a byte, since a signal that comes just before a
    # wait for the event itself is seen only after the next one.
    signals, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if options.on_term == "ignore" else lambda *_: stop.set())
    children = [_child(options) for _ in range(options.children)]
    devices.hold(options.mib, options.pinned_mib)
    if options.say:
        sys.stdout.write("held\n")
        sys.stdout.flush()
    if options.port is not None:
        server = ThreadingHTTPServer(("127.0.0.1", options.port), Health)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    while not stop.is_set():
        os.read(signals, 1)
    for child in children:
        child.terminate()
    if options.on_term.startswith("free-then-linger:"):
        devices.free()
        time.sleep(float(options.on_term.partition(":")[2]))
    for child in children:
        child.wait()
    os._exit(0)


def _child(options: argparse.Namespace) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--say", "--backend", options.backend, "--on-term", options.on_term]
    command += ["--mib", str(options.mib), "--pinned-mib", str(options.pinned_mib)]
    command += ["--linger-ms", str(options.linger_ms), *(["--listed"] if options.listed else [])]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    if child.stdout is None or child.stdout.readline() != b"held\n":
        raise RuntimeError("a child does not hold its memory")
    return child


if __name__ == "__main__":
    main()
