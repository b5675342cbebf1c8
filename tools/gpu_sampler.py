"""Reads the memory of one device 1,000 times a second, without the harness: the judge of what the harness says.

usage: gpu_sampler.py UUID FILE      until its standard input ends; FILE holds triples of doubles: when a reading began
and ended (monotonic, seconds), and the bytes in use
"""

from __future__ import annotations

import array
import gc
import os
import sys
import threading
import time

import pynvml

_PERIOD_S = 0.001
_MOST = 200_000


def _wait_for_end(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()


def _sample(device: object, samples: array.array[float], ended: threading.Event) -> int:
    """Fill the array from its start, and give how many doubles of it are used."""
    size = 0
    due = time.monotonic()
    while not ended.is_set() and size < len(samples):
        samples[size] = time.monotonic()
        samples[size + 2] = pynvml.nvmlDeviceGetMemoryInfo(device, version=pynvml.nvmlMemory_v2).used
        samples[size + 1] = now = time.monotonic()
        size += 3
        due = max(due + _PERIOD_S, now)  # what the driver has delayed is not caught up with
        time.sleep(due - now)
    return size


def main() -> None:
    uuid, path = sys.argv[1:]
    pynvml.nvmlInit()
    device = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    ended = threading.Event()
    threading.Thread(target=_wait_for_end, args=(ended,), daemon=True).start()
    samples = array.array("d", bytes(3 * _MOST * 8))
    gc.disable()
    print("up", flush=True)
    size = _sample(device, samples, ended)
    with open(path, "wb") as file:
        samples[:size].tofile(file)
    os._exit(0 if size < len(samples) else 1)


if __name__ == "__main__":
    main()
