"""Wraps the calls of the product that mark a trial's step, and makes the calls fail that it lets fail."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from tools import chaos_say
from tools.chaos_steps import STEPS

if TYPE_CHECKING:
    from collections.abc import Callable

# What a process forks next, counted: keepers in the watchdog, which their children inherit.
_launches = 0


def install(*, is_in_client: bool) -> None:
    """Wrap what this trial's step and failure need in this process (and in what it forks)."""
    settings = chaos_say.settings()
    step = STEPS.get(settings["step"])
    if step is not None and step.place and step.is_in_client == is_in_client:
        owner, name = find(step.place)
        say_at(owner, name, step.name, is_after=step.is_after, only=_ONLY.get(step.name))
    failure = settings["failure"]
    if failure is not None and (failure["where"] in {"client", "watchdog image"}) == is_in_client:
        _FAILURES[failure["where"]](failure)


def find(place: str) -> tuple[Any, str]:
    """Find what a step's place names: its module or class, and the function's name there."""
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    getattr(owner, name)  # raises AttributeError where the product has changed
    return owner, name


def say_at(owner: Any, name: str, step: str, *, is_after: bool, only: Callable[..., bool] | None = None) -> None:
    """Have a function of the product say the step, before it does its work or after."""
    real = getattr(owner, name)

    def wrapped(*values: Any, **named: Any) -> Any:
        is_it = only is None or only(*values, **named)
        if is_it and not is_after:
            chaos_say.reach(step)
        result = real(*values, **named)
        if is_it and is_after:
            chaos_say.reach(step)
        return result

    setattr(owner, name, wrapped)


def _is_launched(_loop: Any, effect: Any) -> bool:
    return type(effect.reply).__name__ == "Launched"


_ONLY: dict[str, Callable[..., bool]] = {"between spawn and reply": _is_launched}


def _fail_in_client(failure: dict[str, Any]) -> None:
    # multiprocessing forks the watchdog; nothing else forks in this process before that.
    _fail_once(os, "fork", failure, lambda: True)


def _fail_in_watchdog_image(failure: dict[str, Any]) -> None:
    _fail_once(os, "execve", failure, lambda: True)


def _fail_in_watchdog(failure: dict[str, Any]) -> None:
    me = os.getpid()
    _count_launches()
    _fail_once(os, "fork", failure, lambda: os.getpid() == me and _launches == failure["launch"])


def _fail_in_keeper(failure: dict[str, Any]) -> None:
    watchdog = os.getpid()
    _count_launches()

    def is_now() -> bool:
        return os.getppid() == watchdog and _launches == failure["launch"]

    _fail_once(os, "fork", failure, is_now)
    owner, name = find("harness.watchdog.kernel:fork_into")  # where it has a cgroup
    _fail_once(owner, name, failure, is_now)


def _fail_in_root(failure: dict[str, Any]) -> None:
    _count_launches()
    _fail_once(os, "execvpe", failure, lambda: _launches == failure["launch"])


_FAILURES: dict[str, Callable[[dict[str, Any]], None]] = {
    "client": _fail_in_client,
    "watchdog image": _fail_in_watchdog_image,
    "watchdog": _fail_in_watchdog,
    "keeper": _fail_in_keeper,
    "root": _fail_in_root,
}


def _count_launches() -> None:
    owner, name = find("harness.watchdog.kept:_fork")
    real = getattr(owner, name)

    def counted(*values: Any) -> Any:
        global _launches  # noqa: PLW0603 - a forked child must inherit it
        _launches += 1
        return real(*values)

    setattr(owner, name, counted)


def _fail_once(owner: Any, name: str, failure: dict[str, Any], is_now: Callable[[], bool]) -> None:
    real = getattr(owner, name)
    has_failed = False

    def failing(*values: Any) -> Any:
        nonlocal has_failed
        if not has_failed and is_now():
            has_failed = True
            chaos_say.tell(failed=name)
            raise OSError(failure["errno"], os.strerror(failure["errno"]))
        return real(*values)

    setattr(owner, name, failing)
