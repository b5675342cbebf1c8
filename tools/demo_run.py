"""The demo: the suite in demo_suite under `pytest -n 2`, then the same suite killed with SIGKILL in the middle."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from harness import procfs

if TYPE_CHECKING:
    from collections.abc import Callable

PYTEST = [sys.executable, "-m", "pytest", "-p", "no:randomly", "-n", "2"]
# Nothing has come or gone for so long: the servers have started and are being used.
STEADY_S = 0.5
OWN = {
    "harness-watchd": "watchdog of a worker",
    "harness-broker": "broker of a watchdog: GPUs",
    "harness-keeper": "keeper of a server",
}


@dataclass(frozen=True)
class Suite:
    """What is run and killed. The demo kills it once so many server processes are up, and `is_at_work` says so."""

    folder: Path
    enough_processes: int
    note: str
    timeout_s: float = 60.0
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    is_at_work: Callable[[], bool] = lambda: True
    facts: Callable[[], list[str]] = list


def main() -> int:
    # A worker's test has at least three processes of servers.
    note = "a server that ignores SIGTERM gets its grace, here 1.0 s, and is then killed"
    suite = Suite(Path(__file__).with_name("demo_suite"), enough_processes=6, note=note)
    title(f"1. A suite that launches real servers ({suite.folder.name}/test_demo.py) under pytest -n 2")
    code = run_to_its_end(suite, "--durations=0", "--durations-min=0.5")
    title("2. The same suite, and pytest and both workers killed with SIGKILL in the middle")
    left = kill_in_the_middle(suite)
    return 1 if code or left else 0


def title(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m\n" if sys.stdout.isatty() else f"\n{text}\n{'=' * len(text)}", flush=True)


def run_to_its_end(suite: Suite, *options: str) -> int:
    command = [*PYTEST, "-v", *options, str(suite.folder)]
    return subprocess.run(command, env=suite.environment, check=False).returncode


def kill_in_the_middle(suite: Suite) -> int:
    run = subprocess.Popen(
        [*PYTEST, "-q", str(suite.folder)],
        env=suite.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    pids = wait_for_servers(run, suite)
    print("Before:")
    show(pids)
    for fact in suite.facts():
        print(fact)
    pidfds = {pid: os.pidfd_open(pid) for pid in pids}
    started = time.monotonic()
    os.killpg(run.pid, signal.SIGKILL)
    ends_ms = wait_for_ends(pidfds, started)
    run.wait()
    print(f"\nkill -9 of pytest and its workers. {max(ends_ms.values(), default=0.0):.0f} ms after it:")
    left = {pid: text for pid, text in pids.items() if pid not in ends_ms}
    show(left)
    show_ends(pids, ends_ms)
    print(*suite.facts(), f"  ({suite.note})", sep="\n")
    return len(left)


def show_ends(pids: dict[int, str], ends_ms: dict[int, float]) -> None:
    for kind in ("pytest", "server", "keeper", "broker", "watchdog"):
        times = [ends_ms[pid] for pid, text in pids.items() if text.startswith(kind) and pid in ends_ms]
        count = sum(text.startswith(kind) for text in pids.values())
        if count:
            print(f"  {len(times)} of {count} {kind} processes gone, the last after {max(times, default=0.0):.0f} ms")


def wait_for_servers(run: subprocess.Popen[bytes], suite: Suite) -> dict[int, str]:
    """Wait until enough servers are up and at work; give every process of the run with what it is."""
    deadline = time.monotonic() + suite.timeout_s
    seen: dict[int, str] = {}
    since = 0.0
    while time.monotonic() < deadline and run.poll() is None:
        found = {pid: kind_of(pid, run.pid) for pid in [run.pid, *procfs.descendants(run.pid)]}
        if found != seen:
            seen, since = found, time.monotonic()
        is_enough = sum(text.startswith("server") for text in found.values()) >= suite.enough_processes
        if is_enough and time.monotonic() - since > STEADY_S and suite.is_at_work():
            return found
        time.sleep(0.02)  # processes of others appear without telling us
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)
    raise SystemExit(f"the suite did not launch its servers, or not within {suite.timeout_s:.0f} s")


def kind_of(pid: int, run: int) -> str:
    try:
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        name = ""  # it has just ended
    line = procfs.command_line(pid)
    found = procfs.stat(pid)
    if name in OWN:
        return OWN[name]
    if pid == run or (found is not None and found.parent == run):
        return "pytest" if pid == run else "pytest worker"
    shown = " ".join(Path(word).name if word.startswith("/") else word for word in line.split())
    return f"server: {shown[:70]}"


def show(pids: dict[int, str]) -> None:
    """Print the processes as a tree: each below its parent."""
    parents = {pid: found.parent for pid in pids if (found := procfs.stat(pid)) is not None}
    tops = [pid for pid in pids if parents.get(pid) not in pids]
    for top in tops:
        show_below(top, pids, parents, "  ")
    if not pids:
        print("  (no process of the run is left)")


def show_below(pid: int, pids: dict[int, str], parents: dict[int, int], indent: str) -> None:
    print(f"  {pid:>7}{indent}{pids[pid]}")
    for child in [other for other in pids if parents.get(other) == pid]:
        show_below(child, pids, parents, indent + "  ")


def wait_for_ends(pidfds: dict[int, int], started: float) -> dict[int, float]:
    """Wait until every process has exited, at most 30 s; give each one's end in ms after `started`."""
    poll = select.poll()
    pids = {descriptor: pid for pid, descriptor in pidfds.items()}
    for descriptor in pids:
        poll.register(descriptor, select.POLLIN)
    ends_ms: dict[int, float] = {}
    while len(ends_ms) < len(pidfds):
        ready = poll.poll(30_000)
        if not ready:
            break
        for descriptor, _ in ready:
            ends_ms[pids[descriptor]] = (time.monotonic() - started) * 1000
            poll.unregister(descriptor)
            os.close(descriptor)
    return ends_ms


if __name__ == "__main__":
    sys.exit(main())
