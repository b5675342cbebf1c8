"""Keeps another process's device memory beyond that one's end, by copies of its descriptors on the devices.

That is what a leak is made of: the driver gives memory back when the last of them is closed, whoever has it.
usage: gpu_hoarder.py PID            until its standard input ends; prints "kept", or "nothing"
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_PIDFD_GETFD = 438  # on x86-64 and on 64-bit Arm


def _keep(pid: int) -> int:
    libc = ctypes.CDLL(None)
    pidfd = os.pidfd_open(pid)
    count = 0
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        if os.readlink(f"/proc/{pid}/fd/{descriptor}").startswith("/dev/nvidia"):
            count += libc.syscall(_PIDFD_GETFD, pidfd, int(descriptor), 0) >= 0  # a user may not trace everybody
    return count


def _keep_in_stand_in(folder: Path, pid: int) -> list[Path]:
    found = [path for path in folder.glob(f"GPU-*.{pid}") if path.name.endswith(f".{pid}")]
    for path in found:
        mib, kind, start, _, _ = path.read_text(encoding="utf-8").split()
        fresh = path.with_name(f"fresh.{path.name}")
        fresh.write_text(f"{mib} {kind} {start} 1000000 0", encoding="utf-8")
        fresh.rename(path)
    return found


def main() -> None:
    pid = int(sys.argv[1])
    stand_in = os.environ.get("STANDIN_NVML")
    kept = _keep_in_stand_in(Path(stand_in) / "holds", pid) if stand_in else []
    print("kept" if stand_in or _keep(pid) else "nothing", flush=True)
    sys.stdin.read()
    for path in kept:
        path.unlink()


if __name__ == "__main__":
    main()
