"""Limits of the operating system: file descriptors, of which the watchdog needs three and more for each server."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from harness.watchdog import kernel

if TYPE_CHECKING:
    from collections.abc import Callable

BEGIN = """
import os, resource, signal
import harness
from harness import procfs

def limited(soft, hard):
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return harness.Watchdog(crash_grace_s=0.5)

def limits(pid):
    return tuple(resource.prlimit(pid, resource.RLIMIT_NOFILE))
"""


def test_the_soft_limit_is_raised_for_the_watchdog_alone(run_script: Callable[..., str]) -> None:
    """Forty servers need more than twice what the test process may hold; each server is told the same as that."""
    run_script(
        BEGIN,
        """
        with limited(64, 500) as watchdog, watchdog.group() as group:
            for _ in range(40):
                group.launch(["sh", "-c", "ulimit -Sn; ulimit -Hn; sleep 100"], ready=harness.log_line("500"))
            group.wait_ready(timeout_s=60)
            assert len(os.listdir(f"/proc/{watchdog.pid}/fd")) > 64
            assert limits(watchdog.pid) == (500, 500)
            for server in group.servers:
                assert limits(server.pid) == limits(procfs.stat(server.pid).parent) == (64, 500)
                assert server.log_tail() == "64\\n500", server.log_tail()
        """,
    )


def test_a_hard_limit_that_is_too_low_is_named_and_what_runs_is_still_looked_after(
    run_script: Callable[..., str],
) -> None:
    """A few descriptors stay free, so that the orphans of a lost keeper are found and killed."""
    run_script(
        BEGIN,
        """
        with limited(80, 80) as watchdog:
            servers = []
            try:
                while len(servers) < 80:
                    servers.append(watchdog.launch(["sh", "-c", "trap '' TERM; sleep 100 & wait"], grace_s=0.2))
            except harness.LaunchFailed as error:
                words = str(error)
            assert "Too many open files" in words, words
            assert "may hold 80, the hard limit of RLIMIT_NOFILE" in words, words
            assert 5 < len(servers) < 30, len(servers)
            children = procfs.children(watchdog.pid)
            assert len(children) == len(servers), "a keeper of the server that failed is left"
            lost = servers[0]
            os.kill(procfs.stat(lost.pid).parent, signal.SIGKILL)
            outcome = lost.stop()
            assert outcome.how == "killed", outcome
            assert lost.pids() == []
            servers[1].kill()  # the watchdog's log has taken a descriptor of the lost one
            servers.append(watchdog.launch(["sleep", "100"]))  # in their place
            report = watchdog.stop(servers, grace_s=0.2)
            assert report.is_clean, report
        """,
    )


@pytest.mark.parametrize("number", [kernel._SYS_CLOSE_RANGE, 100_000], ids=["close_range", "one by one"])
def test_every_other_descriptor_is_closed(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(kernel, "_SYS_CLOSE_RANGE", number)  # the kernel has none with the second
    read_end, write_end = os.pipe()
    far = os.dup2(read_end, 300)
    pid = os.fork()
    if pid == 0:
        kernel.close_all_but({0, 1, 2, write_end})
        left = [name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]
        os.write(write_end, " ".join(sorted(left, key=int)).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read_end, 1000).decode() == f"0 1 2 {write_end}"
    for descriptor in (read_end, write_end, far):
        os.close(descriptor)
