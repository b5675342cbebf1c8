"""The pytest plugin of a trial, loaded with `-p tools.chaos_plugin`: wraps the client, and has the watchdog wrapped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import channel, forking, link, messages
from tools import chaos_hooks, chaos_say

_HERE = Path(__file__).parent
_SETTINGS = chaos_say.settings()
_HANDLED = {signal.SIGINT, signal.SIGUSR1}
_awaited = ""
_started: list[subprocess.Popen[bytes]] = []


def pytest_load_initial_conftests() -> None:
    """Wrap before the harness's plugin forks its watchdog."""
    _install()


def _install() -> None:
    forking._BOOT = _HERE / "chaos_boot.py"
    forking._NEEDED |= {chaos_say.SETTINGS}
    chaos_hooks.install(is_in_client=True)
    if _SETTINGS["step"] == "a frame is half sent":
        _send_halves()
    elif _SETTINGS["step"] in _AWAITED.values():
        _say_what_is_awaited()
    signal.signal(signal.SIGUSR1, _close_pipe)
    if _SETTINGS["sibling"]:
        _start_sibling()
    if _SETTINGS["flaw"]:
        _FLAWS[_SETTINGS["flaw"]]()
    # From here on its only child is the watchdog.
    chaos_say.tell(hello="test process")


def _send_halves() -> None:
    real = channel.Channel._send

    def send_halves(self: channel.Channel, frame: bytes, deadline: float) -> None:
        # A real frame is sent by one system call, between whose halves no handler runs.
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        try:
            sent = self._socket.send(frame[: len(frame) // 2])
            chaos_say.reach("a frame is half sent")
            real(self, frame[sent:], deadline)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)

    channel.Channel._send = send_halves  # type: ignore[method-assign]


_AWAITED = {"Launch": "between request and reply", "Stop": "between stop and reply"}


def _say_what_is_awaited() -> None:
    real_request, real_reply = channel.Channel.request, channel.Channel._reply

    def request(self: channel.Channel, message_id: int, message: bytes, *more: Any) -> bytes:
        global _awaited  # noqa: PLW0603 - one thread, one request
        _awaited = type(messages.decode(message)).__name__
        return real_request(self, message_id, message, *more)

    def reply(self: channel.Channel, *more: Any) -> bytes:
        if _AWAITED.get(_awaited) == _SETTINGS["step"]:
            chaos_say.reach(_SETTINGS["step"])
        return real_reply(self, *more)

    channel.Channel.request = request  # type: ignore[method-assign,assignment]
    channel.Channel._reply = reply  # type: ignore[method-assign,assignment]


def _close_pipe(_signal: int, _frame: object) -> None:
    """Close this process's end of the Pipe, whoever holds it: that is one of the faults.

    The number stays in use, as the end of a socket pair whose other end is closed: another file must not get it.
    """
    held = [process.descriptor for process in list(forking._processes)]
    held += [found._channel._socket.fileno() for found in list(link._links)]
    for descriptor in held:
        if descriptor >= 0:
            ours, theirs = socket.socketpair()
            theirs.close()
            os.dup2(ours.fileno(), descriptor, inheritable=False)
            ours.close()


def _start_sibling() -> None:
    # A process that the test process starts itself, and never hands over, is nobody else's to end.
    command: list[Any] = [sys.executable, "-I", "-S", _HERE / "chaos_bystander.py", *_SETTINGS["sibling"]]
    _started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL))


def _leave_survivor() -> None:
    _started.append(subprocess.Popen(["/bin/sleep", "60"], start_new_session=True))


def _do_harm() -> None:
    *_, daemon = Path(_SETTINGS["bystander"]).read_text(encoding="ascii").split()
    os.kill(int(daemon), signal.SIGTERM)


# What a product would do that breaks its promise: with these the tests see that the judging works.
_FLAWS = {"survivor": _leave_survivor, "harm": _do_harm}
