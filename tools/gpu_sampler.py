"""Reads the memory of one device 1,000 times a second, without the harness: the judge of what the harness says.

usage: gpu_sampler.py UUID FILE      until its standard input ends; FILE holds pairs of doubles: monotonic s, bytes
"""

from __future__ import annotations

import array
import os
import sys
import threading
import time

import pynvml

_PERIOD_S = 0.001


def _wait_for_end(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()


def main() -> None:
    uuid, path = sys.argv[1:]
    pynvml.nvmlInit()
    device = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    ended = threading.Event()
    threading.Thread(target=_wait_for_end, args=(ended,), daemon=True).start()
    samples = array.array("d")
    print("up", flush=True)
    due = time.monotonic()
    while not ended.is_set():
        used = pynvml.nvmlDeviceGetMemoryInfo(device, version=pynvml.nvmlMemory_v2).used
        samples.extend((time.monotonic(), used))
        due += _PERIOD_S
        time.sleep(max(0.0, due - time.monotonic()))
    with open(path, "wb") as file:
        samples.tofile(file)
    os._exit(0)


if __name__ == "__main__":
    main()
