"""A server that uses its cgroup: python -I -S cgroup_user.py HOW, where cgroup v2 is mounted at $MOUNT.

HOW: `below` makes cgroups below its own, with a child in the deepest; `leave` moves itself out and starts a child
there; `exit` does as `below`, and exits with its child when it is asked to. It says its cgroup, then "ready".
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    how, mount = sys.argv[1], os.environ["MOUNT"]
    with open("/proc/self/cgroup", encoding="ascii") as file:
        own = mount + next(line[3:].rstrip("\n") for line in file if line.startswith("0::"))
    if how == "leave":
        move(os.path.dirname(os.path.dirname(own)))
    # Not signal.pause(): one that comes just before it sleeps is seen only after the next one.
    signals, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    prepared, says_so = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(prepared, 1)
        if how != "leave":
            os.makedirs(f"{own}/a/b")
            move(f"{own}/a/b")
        signal.signal(signal.SIGTERM, signal.SIG_DFL if how == "exit" else signal.SIG_IGN)
        os.write(1, f"{own}\nready\n".encode())
    elif how == "exit":
        signal.signal(signal.SIGTERM, lambda *_: end(child))
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(says_so, b"1")
    while True:
        os.read(signals, 1)


def end(child: int) -> None:
    os.kill(child, signal.SIGTERM)
    os.wait()
    os._exit(0)


def move(cgroup: str) -> None:
    with open(f"{cgroup}/cgroup.procs", "r+", encoding="ascii") as file:
        file.write("0")


if __name__ == "__main__":
    main()
