"""Test processes that are odd: forked, threaded, with closed streams, with ignored signals, with many descriptors."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import processes
import pytest
from servers.commands import READY_S

import harness

if TYPE_CHECKING:
    from collections.abc import Callable


def in_child(work: Callable[[], str]) -> str:
    """Fork this process as os.fork does, do some work in the child, and give what it says."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = work()
        except BaseException:  # noqa: BLE001 - nothing may get out of the child
            said = traceback.format_exc()
        os.write(write_end, said.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as answer:
        said = answer.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return said


def test_closing_twice_and_using_it_afterwards(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(["sleep", "60"])
    group = watchdog.group("dp")
    report = watchdog.close()
    assert watchdog.close() == report
    assert watchdog.start() is watchdog
    for owner in (watchdog, group):
        with pytest.raises(harness.HarnessError, match="this watchdog has been closed"):
            owner.launch(["sleep", "60"])
    assert watchdog.stop([server]).outcomes == (server.stop(),)
    assert (server.state, server.returncode, server.is_alive, server.pids()) == ("gone", -15, False, [])
    assert server.kill() == server.wait() == server.stop() == server.outcome
    with pytest.raises(harness.ServerExited, match="killed by SIGTERM"):
        server.wait_ready()


def test_closing_gives_back_every_descriptor(tmp_path: Path) -> None:
    before = processes.descriptors()
    watchdogs = [harness.Watchdog(state_dir=tmp_path / "state").start() for _ in range(3)]
    watchdogs[0].launch(["sleep", "60"], ready=lambda _: True).wait_ready()
    for watchdog in watchdogs:
        watchdog.close()
    assert processes.descriptors() == before


def test_two_watchdogs_do_not_meet(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    with harness.Watchdog(state_dir=tmp_path / "state") as other:
        servers = [owner.launch(["sh", "-c", "echo {name}"], name="same") for owner in (watchdog, other) for _ in "12"]
        assert [server.wait(READY_S).how for server in servers] == ["exited"] * 4
        assert [server.log_tail() for server in servers] == ["same"] * 4
        mine, others = watchdog.launch(["sleep", "60"]), other.launch(["sleep", "60"])
        assert watchdog.pid != other.pid
    assert others.state == "gone"
    assert mine.state == "running"


def test_everything_works_from_a_thread(tmp_path: Path) -> None:
    done: list[harness.StopReport] = []

    def use() -> None:
        with harness.Watchdog(state_dir=tmp_path / "state") as watchdog, watchdog.group() as group:
            group.launch(["sh", "-c", "echo up; exec sleep 60"], ready=harness.log_line("up"))
            group.wait_ready(READY_S)
            done.append(group.stop())

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert [outcome.how for outcome in done[0].outcomes] == ["asked"]


def test_a_server_outlives_the_thread_that_launched_it(watchdog: harness.Watchdog) -> None:
    thread = threading.Thread(target=watchdog.launch, args=(["sleep", "60"],))
    thread.start()
    thread.join()
    assert watchdog.servers[0].state == "running"


def test_a_watchdog_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    watchdog = harness.Watchdog(state_dir=tmp_path / "state")
    thread = threading.Thread(target=watchdog.start)
    thread.start()
    thread.join()
    with watchdog:
        assert watchdog.launch(["sleep", "60"]).state == "running"


def test_a_forked_child_is_told_that_the_watchdog_is_not_its_own(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(["sleep", "60"])

    def use_all() -> str:
        said = []
        uses: list[Callable[[], object]] = [
            lambda: watchdog.launch(["sleep", "60"]),
            lambda: watchdog.adopt(os.getpid()),
            server.status,
            server.stop,
            server.kill,
            lambda: server.send_signal(15),
            lambda: server.wait(1.0),
            lambda: watchdog.stop([server]),
        ]
        for use in uses:
            with pytest.raises(harness.HarnessError) as caught:
                use()
            said.append("SpecError" if caught.type is harness.SpecError else str(caught.value))
        return "\n".join([*said, str(watchdog.is_alive), str(watchdog.close().outcomes)])

    *said, is_alive, outcomes = in_child(use_all).splitlines()
    clear = f"this watchdog belongs to process {os.getpid()}: a forked child cannot use it, start one of its own"
    assert said == [clear, "SpecError", *[clear] * 6]
    assert (is_alive, outcomes) == ("False", "()")
    assert (server.state, watchdog.is_alive) == ("running", True)


def test_a_forked_child_starts_a_watchdog_of_its_own(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    watchdog.launch(["sleep", "60"])

    def start_its_own() -> str:
        with harness.Watchdog(state_dir=tmp_path / "child") as own:
            return f"{own.launch(['sleep', '60']).stop().how} {own.pid != watchdog.pid}"

    assert in_child(start_its_own) == "asked True"
    assert watchdog.servers[0].state == "running"


def test_a_forked_child_of_a_forked_child_keeps_its_own_descriptors(watchdog: harness.Watchdog) -> None:
    def fork_again() -> str:
        # The child takes every number that letting go of the Pipe has made free.
        taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(8)]

        def count() -> str:
            return str(sum(map(_is_open, taken)))

        return in_child(count)

    assert watchdog.is_alive
    assert in_child(fork_again) == "8"


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


FORKING = """
import multiprocessing, os, sys
import harness

def leave(): {leave}

with harness.Watchdog() as watchdog:
    server = watchdog.launch(["sleep", "60"])
    {fork}
    assert code == 3, code
    assert server.state == "running" and watchdog.is_alive
    print(server.stop().how)
"""
OS_FORK = """
    child = os.fork()
    if child == 0: leave()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""
PROCESS = """
    child = multiprocessing.get_context("fork").Process(target=leave)
    child.start()
    child.join()
    code = child.exitcode
"""


@pytest.mark.parametrize("leave", ["sys.exit(3)", "os._exit(3)"])
@pytest.mark.parametrize("fork", [OS_FORK, PROCESS], ids=["os.fork", "multiprocessing"])
def test_a_forked_child_that_exits_does_not_disturb_the_watchdog(
    run_script: Callable[..., str], leave: str, fork: str
) -> None:
    assert run_script(FORKING.format(leave=leave, fork=fork)) == "asked\n"


def test_a_script_that_forgets_to_close(run_script: Callable[..., str]) -> None:
    script = """
        import harness
        watchdog = harness.Watchdog().start()
        servers = [watchdog.launch(["sleep", "60"]) for _ in range(3)]
        print(*[watchdog.pid, *(pid for server in servers for pid in server.pids())])
    """
    pids = [int(pid) for pid in run_script(script).split()]
    assert len(pids) == 4
    assert not [pid for pid in pids if processes.identify(pid)]


USING = """
import os, harness
with harness.Watchdog() as watchdog, watchdog.group() as group:
    group.launch(["sh", "-c", "readlink /proc/self/fd/0; echo up; exec sleep 60"], ready=harness.log_line("up"))
    group.launch(["sleep", "60"], ready=lambda server: True)
    group.wait_ready(30)
    said = group.servers[0].log_tail() + "\\n" + " ".join(outcome.how for outcome in group.stop().outcomes)
with open(os.environ["RESULT"], "w") as result:
    result.write(said)
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-", "<&- >&- 2>&-", "2>&-"])
def test_standard_streams_that_are_closed(run_script: Callable[..., str], closed: str, tmp_path: Path) -> None:
    run_script(USING, via=f'exec "$@" {closed}')
    assert (tmp_path / "result").read_text(encoding="utf-8") == "/dev/null\nup\nasked asked"


def test_ignored_and_blocked_signals_of_the_test_process(run_script: Callable[..., str], tmp_path: Path) -> None:
    ignore = """
        import signal
        for number in ("SIGCHLD", "SIGTERM", "SIGPIPE", "SIGHUP", "SIGUSR1"):
            signal.signal(getattr(signal, number), signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2, signal.SIGINT})
    """
    check = """
        with harness.Watchdog() as watchdog:
            server = watchdog.launch(["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"])
            server.wait(30)
            print(server.log_tail(), watchdog.launch(["sleep", "60"]).stop().how)
    """
    said = run_script(ignore, USING, check)
    assert (tmp_path / "result").read_text(encoding="utf-8").endswith("asked asked")
    _, blocked, _, ignored, how = said.split()
    assert (processes.signal_set(blocked), processes.signal_set(ignored), how) == (0, 0, "asked")


def test_a_watchdog_that_the_kernel_reaped_is_forgotten(run_script: Callable[..., str]) -> None:
    script = """
        import multiprocessing, signal
        import harness
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        with harness.Watchdog() as watchdog:
            watchdog.launch(["sleep", "60"])
        print(multiprocessing.active_children())
    """
    assert run_script(script) == "[]\n"


def test_a_process_with_many_descriptors(run_script: Callable[..., str], tmp_path: Path) -> None:
    many = """
        import os, resource
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 5000), hard))
        held = [os.open("/dev/null", os.O_RDONLY) for _ in range(min(hard, 5000) - 200)]
    """
    run_script(many, USING)
    assert (tmp_path / "result").read_text(encoding="utf-8").endswith("asked asked")


def test_a_module_that_the_platform_lacks_is_named(run_script: Callable[..., str]) -> None:
    script = """
        import sys, multiprocessing.connection, multiprocessing.util
        sys.modules["fcntl"] = None  # as on Windows
        sys.platform = "win32"
        import harness
        try:
            harness.Watchdog().start()
        except harness.PlatformNotSupported as error:
            print(error)
    """
    assert "the watchdog needs Linux" in run_script(script)


def test_a_call_that_waits_while_another_thread_stops_the_server(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(["sleep", "60"])
    outcomes: list[harness.ServerOutcome] = []
    threads = [threading.Thread(target=lambda: outcomes.append(server.wait(READY_S))) for _ in range(4)]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    server.stop()
    for thread in threads:
        thread.join()
    assert outcomes == [server.stop()] * 4
    assert time.monotonic() - began < READY_S


def test_an_idle_watchdog_loads_no_more_than_it_needs() -> None:
    """Each of these is up to 2 MiB, and milliseconds of every run's start, in the watchdog and all its keepers."""
    code = "import sys; sys.path.append(sys.argv[1]); import harness.watchdog.main; print(*sys.modules)"
    folder = str(Path(harness.__file__).parents[1])
    command = [sys.executable, "-I", "-S", "-c", code, folder]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not {"typing", "dataclasses", "socket", "pathlib", "subprocess", "multiprocessing", "psutil"} & set(loaded)
