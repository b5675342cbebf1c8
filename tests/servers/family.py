"""A server program that lives a plan: a JSON object, see `servers.commands.member`. Run with `python -I -S`.

It says what happens to each member of the family, a line for each event, with the pid or the monotonic time.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any, NoReturn


def say(*words: object) -> None:
    """Write one whole line."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def live(plan: dict[str, Any], told: int | None) -> NoReturn:
    """Be one member: start the children, say that it is ready, and wait for signals."""
    name = plan["name"]

    def on_term(_number: int, _frame: object) -> None:
        say(name, "asked", time.monotonic())
        if plan["term"] == "note":
            return
        time.sleep(plan["takes_s"])  # stands for the work that a server does when it is asked to exit
        say(name, "ends", time.monotonic())
        os._exit(plan["code"])

    # Not signal.pause(): one that comes just before it sleeps is seen only after the next one.
    signals, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if plan["term"] == "ignore" else on_term)
    for child in plan["children"]:
        start(child)
    say(name, "ready", os.getpid())
    if told is not None:
        os.write(told, b"x")
        os.close(told)
    if plan["leaves"]:
        os._exit(plan["code"])
    while True:
        os.read(signals, 1)


def start(plan: dict[str, Any]) -> None:
    """Fork a child, twice and in a session of its own if it is to be a daemon, and wait until it is ready."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        if plan["daemon"]:
            os.setsid()
            if os.fork():
                os._exit(0)
        live(plan, write_end)
    os.close(write_end)
    os.read(read_end, 1)
    os.close(read_end)
    if plan["daemon"]:
        os.waitpid(child, 0)


if __name__ == "__main__":
    live(json.loads(sys.argv[1]), None)
