"""A server of some processes, which takes a time to stop: STOP_S PATH [ignore] [daemon] [children=N] [gpu=MIB].

When all of them are there, it writes their pids to PATH, as JSON. After SIGTERM it takes STOP_S and exits, and leaves
its children to whoever stops it. With `ignore` it ignores SIGTERM; with `daemon` it has a child that has left its
session and is no longer its descendant; with `gpu` it has one that holds so much memory of a GPU, and a quarter of that
of the host.
"""

import json
import os
import signal
import sys
import time

_SLEEP = ["sleep", "600"]
# Whatever becomes of who started it, it ends.
_LIVES_S = 600


def serve() -> None:
    """Start the others, tell, wait for SIGTERM, take the time, exit."""
    signal.alarm(_LIVES_S)
    stop_s, path, *options = sys.argv[1:]
    numbers = [int(option.removeprefix("children=")) for option in options if option.startswith("children=")]
    others = [os.posix_spawnp(_SLEEP[0], _SLEEP, os.environ) for _ in range(sum(numbers))]
    others += [_engine(int(option.removeprefix("gpu="))) for option in options if option.startswith("gpu=")]
    if "daemon" in options:
        others.append(_daemon())
    if "ignore" in options:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _tell(path, [os.getpid(), *others])
        signal.pause()  # which no signal that is ignored ends; one that is blocked would be waited for all the same
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    _tell(path, [os.getpid(), *others])
    signal.sigwait({signal.SIGTERM})
    time.sleep(float(stop_s))
    os._exit(0)


def _daemon() -> int:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.setsid()
        daemon = os.fork()
        if not daemon:
            os.execvp(_SLEEP[0], _SLEEP)  # noqa: S606 - no shell is wanted
        os.write(writer, b"%d" % daemon)
        os._exit(0)
    os.waitpid(child, 0)
    return int(os.read(reader, 20))


def _engine(mib: int) -> int:
    reader, writer = os.pipe()
    engine = os.fork()
    if not engine:
        signal.alarm(_LIVES_S)  # fork(2) clears it
        sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "tests"))
        from servers.gpu_server import CudaDevices  # noqa: PLC0415 - found only now

        CudaDevices().hold(mib, mib // 4)
        os.write(writer, b"h")
        signal.pause()
    os.close(writer)
    if os.read(reader, 1) != b"h":
        raise RuntimeError("the GPU's memory cannot be held")
    return engine


def _tell(path: str, pids: list[int]) -> None:
    with open(path + ".new", "w", encoding="ascii") as file:
        json.dump(pids, file)
    os.rename(path + ".new", path)


serve()
