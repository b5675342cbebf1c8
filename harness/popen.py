"""`Server.proc`: a server's root with the names and meanings of `subprocess.Popen`."""

from __future__ import annotations

import signal
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.server import Server


class ServerProcess:
    """The root of a server, for code that was written for `subprocess.Popen`."""

    def __init__(self, server: Server) -> None:
        """Take the server."""
        self._server = server

    @property
    def pid(self) -> int:
        """Give the root's pid."""
        return self._server.pid

    @property
    def returncode(self) -> int | None:
        """Give the root's return code, None while it runs."""
        return self._server.returncode

    def poll(self) -> int | None:
        """Give the root's return code, None while it runs."""
        return self._server.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait until the root has exited; raises `subprocess.TimeoutExpired` after `timeout` seconds."""
        if not self._server.wait_until("exit", timeout):
            raise subprocess.TimeoutExpired(self._server.name, timeout or 0.0)
        return self._server.returncode

    def send_signal(self, sig: int) -> None:
        """Send a signal to the root; does nothing if it has exited."""
        self._server.send_signal(sig)

    def terminate(self) -> None:
        """Send SIGTERM to the root."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the root."""
        self.send_signal(signal.SIGKILL)
