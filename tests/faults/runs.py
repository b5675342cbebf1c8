"""Real pytest runs of a real suite, for fault tests: start one, know all its processes, see that all of them end."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness import procfs

if TYPE_CHECKING:
    from collections.abc import Sequence

TREE_SERVER = Path(__file__).with_name("tree_server.py")

_SUITE = """
import json, os, pathlib, signal, sys, time
import pytest
import harness

HERE = pathlib.Path(__file__).parent
SERVER = [sys.executable, "-I", "-S", {server!r}, str(HERE)]

@pytest.mark.parametrize("number", range({tests}))
def test_servers(watchdog, server_group, number):
    ready = harness.log_line("ready")
    for options in {servers!r}:
        server_group.launch([*SERVER, *options], ready=ready, grace_s={grace_s})
    server_group.wait_ready(timeout_s=60)
    up = {{
        "client": os.getpid(),
        "parent": os.getppid(),
        "watchdog": watchdog.pid,
        "trees": [server.pids() for server in server_group.servers],
        "keepers": [harness.procfs.stat(server.pid).parent for server in server_group.servers],
    }}
    (HERE / f"up-{{number}}.tmp").write_text(json.dumps(up))
    (HERE / f"up-{{number}}.tmp").rename(HERE / f"up-{{number}}.json")
    {ending}
"""

# What a test does first that is to go on when the fault test says so (`Run.go`): by a file, of which nothing tells.
GATE = "while not (HERE / 'go').exists(): time.sleep(0.01)\n    "
# How a test waits to be ended; the sleep reaches no state. Not signal.pause(): a signal that comes just before that
# sleeps is seen only after the next one.
WAIT = "while True: time.sleep(0.01)"
POLITE: tuple[str, ...] = ()
STUBBORN = ("--ignore",)


@dataclass(frozen=True)
class Up:
    """One test of the run that has its servers up."""

    client: int
    parent: int
    watchdog: int
    trees: list[list[int]]
    keepers: list[int]

    @property
    def server_pids(self) -> list[int]:
        return [pid for tree in self.trees for pid in tree]


class Watched:
    """Processes that were alive when this was made, each held by a pidfd, so that no reused pid can deceive."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pidfds = {pid: os.pidfd_open(pid) for pid in pids}

    def __enter__(self) -> Watched:  # noqa: PYI034 - typing.Self is there from Python 3.11 on
        return self

    def __exit__(self, *_error: object) -> None:
        for descriptor in self._pidfds.values():
            os.close(descriptor)

    def alive(self) -> list[int]:
        """Give those that have not exited."""
        return [pid for pid, descriptor in self._pidfds.items() if not is_readable(descriptor, 0.0)]

    def wait_gone(self, timeout_s: float) -> list[int]:
        """Wait until all have exited; give those that have not after the time."""
        deadline = time.monotonic() + timeout_s
        for descriptor in self._pidfds.values():
            is_readable(descriptor, max(0.0, deadline - time.monotonic()))
        return self.alive()


def is_readable(descriptor: int, timeout_s: float) -> bool:
    """Wait for a descriptor (a pidfd is readable once its process has exited)."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


class Run:
    """One pytest run, in a session of its own."""

    def __init__(
        self,
        directory: Path,
        *options: str,
        ending: str = WAIT,
        tests: int = 1,
        servers: Sequence[Sequence[str]] = (POLITE, STUBBORN),
        grace_s: float = 15.0,
        crash_grace_s: float = 2.0,
        is_piped: bool = False,
    ) -> None:
        self.directory = directory
        text = _SUITE.format(
            server=str(TREE_SERVER), servers=[list(s) for s in servers], tests=tests, ending=ending, grace_s=grace_s
        )
        (directory / "test_suite.py").write_text(text, encoding="utf-8")
        (directory / "pytest.ini").write_text(f"[pytest]\nharness_crash_grace_s = {crash_grace_s}\n", encoding="utf-8")
        self.output = directory / "output"
        self._tests = tests
        self._crash_grace_s = crash_grace_s
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--rootdir", str(directory), str(directory)],
                stdout=subprocess.PIPE if is_piped else output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=directory,
                env={**os.environ, "HARNESS_STATE_DIR": str(directory / "state")},
                start_new_session=True,
            )

    def ups(self, timeout_s: float = 60.0) -> list[Up]:
        """Wait until every test has its servers up."""
        names = [self.directory / f"up-{number}.json" for number in range(self._tests)]
        deadline = time.monotonic() + timeout_s
        while not all(name.exists() for name in names):
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.01)  # the files are made by another process: there is nothing else to wait for
        return [Up(**json.loads(name.read_text(encoding="utf-8"))) for name in names]

    def go(self) -> None:
        """Let the tests that wait at the GATE go on."""
        (self.directory / "go").touch()

    def end(self, timeout_s: float = 60.0) -> int:
        """Wait until pytest itself has ended."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.text()) from None

    def text(self) -> str:
        """Give what pytest has printed."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def asked(self) -> set[int]:
        """Give the pids of the server processes that have got SIGTERM."""
        return {int(path.name.removeprefix("asked-")) for path in self.directory.glob("asked-*")}

    def kill_rest(self) -> None:
        """End whatever of the run is left, when a test has failed."""
        # Once it has been waited for, its number may be another process's.
        pids = [self.process.pid, *procfs.descendants(self.process.pid)] if self.process.poll() is None else []
        for path in self.directory.glob("up-*.json"):
            up = Up(**json.loads(path.read_text(encoding="utf-8")))
            with contextlib.suppress(ProcessLookupError), Watched([up.watchdog, *up.keepers]) as owners:
                owners.wait_gone(
                    self._crash_grace_s + 2.0
                )  # they may be on their way out, and remove what they have made
            pids += [pid for pid in (up.watchdog, *up.keepers, *up.server_pids) if self._is_ours(pid)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def _is_ours(self, pid: int) -> bool:
        return str(self.directory) in procfs.command_line(pid)
