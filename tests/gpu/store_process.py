"""Other processes that use a store, for tests of it.

usage: store_process.py hold DIRECTORY                  lock it, print "held", and stay so
       store_process.py turn DIRECTORY                  be the next one, print "held", and stay so
       store_process.py add DIRECTORY USER              become this user, add 1, print the new number or the error
       store_process.py die BEFORE DIRECTORY SHARED     for n = 1, 2 ...: make DIRECTORY/n with BEFORE changes, and have
                                                        a child make another and kill itself at its n-th system call;
                                                        prints a line for each: n, the call, how it ended
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
import types
from typing import TYPE_CHECKING, Any

import filelock

from harness.broker.store import Store, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_STEPS = 500
# What is called to die, and what only asks what this process knows already.
SPARED = {"kill", "_exit", "getpid", "geteuid", "fspath", "fsencode", "strerror", "fork", "waitpid"}


def add(content: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Count; each content is shorter than the one before, so that what is torn has the end of another."""
    number = content.get("number", 0) + 1
    return {"number": number, "filler": "x" * (3000 - 500 * number)}, number


def say(text: object) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def hold(directory: str) -> None:
    def edit(content: dict[str, Any]) -> tuple[dict[str, Any], None]:
        _stay()
        return content, None

    Store(directory).change(edit, timeout_s=5.0)


def turn(directory: str) -> None:
    descriptor = os.open(f"{directory}/book.turn", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    _stay()


def _stay() -> None:
    say("held")
    time.sleep(100)  # until it is killed: it is somebody who does not let go


def add_as(directory: str, user: int) -> None:
    filelock.lock_descriptor  # noqa: B018 - loaded while its files can be read
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    try:
        say(Store(directory, is_shared=True).change(add, timeout_s=5.0))
    except StoreError as error:
        say(error)


def die(before: int, base: str, *, is_shared: bool) -> None:
    for step in range(1, MOST_STEPS):
        directory = f"{base}/{step}"
        if is_shared:
            os.mkdir(directory)
            os.chmod(directory, 0o1777)  # noqa: S103 - so it is
        for _ in range(before):
            Store(directory, is_shared=is_shared).change(add, timeout_s=5.0)
        child = os.fork()
        if child == 0:
            _die_at(step, Store(directory, is_shared=is_shared))
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            say(f"{step} none {status}")
            return


def _die_at(step: int, store: Store) -> None:
    os.umask(0o077)
    calls = 0

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                if name == "pwrite":
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
                real_write(1, f"{step} {name} -9\n".encode())
                real_kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return count

    real_write, real_kill = os.write, os.kill
    for name, value in list(vars(os).items()):
        if isinstance(value, types.BuiltinFunctionType) and name not in SPARED:
            setattr(os, name, counted(name, value))
    fcntl.flock = counted("flock", fcntl.flock)
    code = 1
    try:
        store.change(add, timeout_s=5.0)
        code = 0
    finally:
        os._exit(code)


def main() -> None:
    what, *arguments = sys.argv[1:]
    if what == "add":
        add_as(arguments[0], int(arguments[1]))
    elif what == "die":
        die(int(arguments[0]), arguments[1], is_shared=arguments[2] == "shared")
    else:
        {"hold": hold, "turn": turn}[what](arguments[0])


if __name__ == "__main__":
    main()
