"""A hostile server: a tree of processes that leave, daemonise, ignore, hide and multiply.

Usage: python -I -S chaos_server.py MARK NODE [PORT]. NODE is JSON (`chaos_plan` makes it): what this process does, and
what is below it. Every process holds the file MARK open, and ends by an alarm of its own after LIFE_S.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_LIFE_S = 60
_PR_SET_NAME = 15
# Fields of /proc/PID/stat, proc(5), counted after the command's name.
_ARG_START, _ENV_END = 45, 48

began = time.monotonic()
listeners: list[socket.socket] = []


def live(node: dict[str, Any], *, is_root: bool = False) -> NoReturn:
    """Be one process of the tree."""
    signal.alarm(_LIFE_S)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if node["ignores"] else signal.SIG_DFL)
    if node["slow_s"]:
        signal.signal(signal.SIGTERM, lambda *_: exit_slowly(node["slow_s"]))
    if node["clears"]:
        bare = json.dumps({**node, "clears": False})
        flags = ["-I", "-S", os.path.abspath(__file__), sys.argv[1], bare, *sys.argv[3:]]
        os.execve(sys.executable, [sys.executable, *flags, *(["root"] if is_root else ["below"])], {})  # noqa: S606 - no shell is wanted
    for below in node["below"]:
        start(below)
    if node["retitles"]:
        retitle()
    for _ in range(node["storm"]):
        if os.fork() == 0:
            signal.alarm(_LIFE_S)
            rest({**node, "chats": False})
    if is_root:
        tell_ready()
        if node["leaves"]:
            os._exit(0)
    rest(node)


def rest(node: dict[str, Any]) -> NoReturn:
    """Do nothing, or what this node does for good."""
    while node["hops_s"]:
        hop(node["hops_s"])
    while node["chats"]:
        chat()
    # Not signal.pause(): a signal that comes just before it sleeps is seen only after the next one.
    signals, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    while True:
        os.read(signals, 1)


def exit_slowly(seconds: float) -> NoReturn:
    """Take the time that this process needs to exit."""
    time.sleep(seconds)
    os._exit(0)


def start(node: dict[str, Any]) -> None:
    """Start a process below this one, as its node says."""
    if node["how"] == "daemon":
        between = os.fork()
        if between:
            os.waitpid(between, 0)
            return
        os.setsid()
        if os.fork():
            os._exit(0)
        live(node)
    if os.fork() == 0:
        if node["how"] == "setsid":
            os.setsid()
        live(node)


def hop(pause_s: float) -> None:
    """Go on in a child in a session of its own: nobody is found where he was seen."""
    time.sleep(pause_s)
    left_s = _LIFE_S - (time.monotonic() - began)
    if left_s < 1 or os.fork():
        os._exit(0)
    os.setsid()
    signal.alarm(int(left_s) + 1)


def chat() -> None:
    """Write to the log, however full the disk is."""
    try:
        os.write(1, b"." * 4095 + b"\n")
    except OSError:
        time.sleep(0.02)
    time.sleep(0.02)


def retitle() -> None:
    """Do what setproctitle does: overwrite the command line and the environment that /proc shows."""
    import ctypes  # noqa: PLC0415 - it takes 10 ms, and few need it

    with open("/proc/self/stat", encoding="utf-8", errors="replace") as stat:
        fields = stat.read().rpartition(")")[2].split()
    first, end = int(fields[_ARG_START]), int(fields[_ENV_END])
    ctypes.memset(first, 0, end - first)
    ctypes.memmove(first, b"served", 6)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, b"served", 0, 0, 0)


def tell_ready() -> None:
    """Say it in the log, and listen if there is a port."""
    if len(sys.argv) > 3 and sys.argv[3] != "0":
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", int(sys.argv[3])))
        listener.listen()
        listeners.append(listener)
    try:
        os.write(1, b"ready\n")
    except OSError:
        return


mark = os.open(sys.argv[1], os.O_RDONLY)
os.set_inheritable(mark, False)
live(json.loads(sys.argv[2]), is_root=sys.argv[4:] in ([], ["root"]))
