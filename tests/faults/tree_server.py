"""A server with a whole tree: a worker in its group, and a daemon (setsid, double fork) without any environment.

Usage: python -I -S tree_server.py MARKS [--ignore] [--stop-s SECONDS] [--uid NUMBER]. Every process that is asked to
exit leaves an empty file `asked-PID` in the directory MARKS. `--ignore` makes all three ignore SIGTERM after that.
`--uid` makes them another user's (only root can do that).
"""

from __future__ import annotations

import argparse
import os
import signal
import time


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("marks")
    parser.add_argument("--ignore", action="store_true")
    parser.add_argument("--stop-s", type=float, default=0.0)
    parser.add_argument("--uid", type=int, default=None)
    options = parser.parse_args()
    if options.uid is not None:
        os.setgroups([])
        os.setgid(options.uid)
        os.setuid(options.uid)
    take_sigterm(options)  # each process that is forked from here has it from its first instant on
    if os.fork() == 0:
        serve()
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(write_end, b"up")
            os.environ.clear()
            serve()
        os._exit(0)
    os.wait()
    os.read(read_end, 2)
    os.write(1, b"ready\n")
    serve()


def take_sigterm(options: argparse.Namespace) -> None:
    def on_sigterm(_signal: int, _frame: object) -> None:
        os.close(os.open(os.path.join(options.marks, f"asked-{os.getpid()}"), os.O_CREAT | os.O_WRONLY))
        if not options.ignore:
            time.sleep(options.stop_s)  # that is what this server is asked to do: to take its time
            os._exit(0)

    signal.signal(signal.SIGTERM, on_sigterm)


def serve() -> None:
    # Not signal.pause(): one that comes just before it sleeps is seen only after the next one.
    signals, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    while True:
        os.read(signals, 1)


if __name__ == "__main__":
    main()
