"""A server that takes SECONDS after SIGTERM, and writes when it was asked and when it exited: SECONDS PATH.

Both times are of the monotonic clock, which all processes share.
"""

import os
import signal
import sys
import time


def serve() -> None:
    """Wait for SIGTERM, take the time, exit."""
    stop_s, path = float(sys.argv[1]), sys.argv[2]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    print("ready", flush=True)
    signal.sigwait({signal.SIGTERM})
    asked = time.monotonic()
    times = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    time.sleep(asked + stop_s - time.monotonic())
    os.write(times, f"{asked} {time.monotonic()}".encode())
    os._exit(0)


serve()
