"""Tests that hang, in real pytest runs: their servers are stopped, they fail with their stacks, and the run goes on.

The sleeps in the suites here are the hanging itself, or (where they are short) a test that takes so long and does not
hang: nothing waits for a state by one.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import processes
import pytest
from faults.runs import Watched

from harness import procfs
from harness.hung_tests import _SIGNAL
from harness.watchdog.client_process import ClientProcess

if TYPE_CHECKING:
    from pathlib import Path

PLAIN: tuple[str, ...] = ("-p", "no:xdist")
XDIST = ("-n", "1")
# Enough for what can react, on a busy machine; and for what cannot, no longer than the servers need.
LONG_GRACE_S = 60.0
GRACE_S = 4.0
# Where something must be done between two steps of the end.
SLOW_GRACE_S = 12.0

SUITE = """
import ctypes, os, pathlib, pdb, signal, sys, time, urllib.request
import pytest
import harness

HERE = pathlib.Path(__file__).parent

def note(name, servers):
    (HERE / name).write_text(" ".join(str(pid) for server in servers for pid in server.pids()))

@pytest.fixture(scope="session")
def shared(watchdog):
    server = watchdog.launch(["sleep", "600"], name="shared", grace_s=1.0)
    note("shared", [server])
    return server

def test_before(shared):
    pass

def wait_in_the_client(group):
    group.servers[0].wait()

def sleep(group):
    time.sleep(600)

def ask_a_dead_server(group):
    server = group.launch([sys.executable, "-m", "http.server", "{port}"], ready=harness.http_ok("/"))
    server.wait_ready(timeout_s=30)
    server.send_signal(signal.SIGSTOP)
    urllib.request.urlopen(server.url())

def stop_itself(group):
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)

def hold_the_gil(group):
    libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # for ever, whatever signal comes

def catch_everything(group):
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass

def hide_it(group):
    try:
        time.sleep(600)
    except BaseException:
        pass

def test_hangs(server_group):
    for name in ("a", "b"):
        server_group.launch(["sh", "-c", "trap '' TERM; sleep 600 & wait; wait"], name=name, grace_s=60.0)
    note("own", server_group.servers)
    HANG(server_group)

def test_after():
    pass
"""


ASYNC_SUITE = """
import anyio, sys
import pytest
import harness

pytestmark = pytest.mark.anyio

@pytest.fixture(params=["BACKEND"])
def anyio_backend(request):
    return request.param

@pytest.mark.harness_deadline(4)
async def test_hangs(server_group):
    async with server_group:
        await server_group.launch_async(["sleep", "600"], ready=lambda server: False)
        await HANG

async def test_after(watchdog):
    async with await watchdog.launch_async(["sleep", "600"]) as server:
        assert server.is_alive
"""


def suite(pytester: pytest.Pytester, hang: str, *, grace_s: float = GRACE_S) -> None:
    marked = "@pytest.mark.harness_deadline(4)\ndef test_hangs"
    pytester.makepyfile(test_suite=SUITE.replace("def test_hangs", marked).replace("HANG(", f"{hang}("))
    pytester.makeini(f"[pytest]\nharness_deadline_grace_s = {grace_s}\nharness_crash_grace_s = 1.0\n")


@pytest.mark.parametrize(
    ("backend", "hang"),
    [
        ("asyncio", "server_group.wait_ready_async()"),
        ("asyncio", "server_group.servers[0].wait_async()"),
        ("asyncio", "anyio.sleep(600)"),
        ("trio", "server_group.wait_ready_async()"),
        ("trio", "server_group.servers[0].wait_async()"),
    ],
)
def test_an_async_test_that_hangs_fails(pytester: pytest.Pytester, backend: str, hang: str) -> None:
    pytester.makepyfile(test_suite=ASYNC_SUITE.replace("BACKEND", backend).replace("HANG", hang))
    pytester.makeini(f"[pytest]\nharness_deadline_grace_s = {LONG_GRACE_S}\nharness_crash_grace_s = 1.0\n")
    result, text = run(pytester)
    result.assert_outcomes(passed=1, failed=1)
    assert "this test hangs: its deadline of 4 s has passed" in text


def run(pytester: pytest.Pytester, *options: str) -> tuple[pytest.RunResult, str]:
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "error", *options, timeout=60)
    return result, result.stdout.str() + result.stderr.str()


def noted(path: Path, name: str) -> list[int]:
    return [int(pid) for pid in (path / name).read_text(encoding="utf-8").split()]


def check_nothing_is_left(path: Path) -> None:
    for name in ("own", "shared"):
        processes.wait_gone(noted(path, name), 15.0)


@pytest.mark.parametrize("options", [PLAIN, XDIST], ids=["plain", "xdist"])
@pytest.mark.parametrize(
    "hang", ["sleep", "wait_in_the_client", "ask_a_dead_server", "stop_itself", "hide_it"], ids=str
)
def test_a_test_that_can_be_interrupted_fails_and_the_run_goes_on(
    pytester: pytest.Pytester, hang: str, options: tuple[str, ...]
) -> None:
    suite(pytester, hang, grace_s=LONG_GRACE_S)
    result, text = run(pytester, *options)
    result.assert_outcomes(passed=2, failed=1)  # also if it has caught what was raised in it
    assert "this test hangs: its deadline of 4 s has passed" in text
    assert re.search(rf'File ".*test_suite.py", line \d+ in {hang}\n', text), text
    assert "_pytest/" not in text.split("harness: stacks at the deadline")[1].split("short test summary")[0]
    check_nothing_is_left(pytester.path)


@pytest.mark.parametrize("hang", ["hold_the_gil", "catch_everything"])
def test_a_worker_that_cannot_be_interrupted_is_ended_and_replaced(pytester: pytest.Pytester, hang: str) -> None:
    suite(pytester, hang)
    result, text = run(pytester, *XDIST)
    result.assert_outcomes(passed=2, failed=1)
    assert "worker 'gw0' crashed while running 'test_suite.py::test_hangs'" in text
    section = text.split("harness: why the worker was ended")[1]
    assert "test_suite.py::test_hangs: its deadline of 4 s has passed, and it still runs 4 s later" in section
    assert re.search(rf'File ".*test_suite.py", line \d+ in {hang}\n', section), text
    check_nothing_is_left(pytester.path)


@pytest.mark.parametrize("capture", ["-s", "--capture=fd", "--capture=sys"])
def test_a_run_that_cannot_be_interrupted_says_why_it_is_ended(pytester: pytest.Pytester, capture: str) -> None:
    suite(pytester, "hold_the_gil")
    result, text = run(pytester, *PLAIN, capture)
    assert result.ret == -9
    assert "harness: test_suite.py::test_hangs: its deadline of 4 s has passed, and it still runs 4 s later" in text
    assert re.search(r'File ".*test_suite.py", line \d+ in hold_the_gil\n', result.stderr.str()), text
    check_nothing_is_left(pytester.path)


def test_first_the_servers_of_the_hung_test_are_stopped_then_all(pytester: pytest.Pytester) -> None:
    suite(pytester, "catch_everything", grace_s=SLOW_GRACE_S)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *PLAIN]
    with subprocess.Popen(command, cwd=pytester.path, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) as process:
        processes.wait_for(lambda: noted_all(pytester.path), 30.0, "its servers")
        own, shared = noted(pytester.path, "own"), noted(pytester.path, "shared")
        with Watched([process.pid]) as client, Watched(shared) as others, Watched(own) as its:
            assert its.wait_gone(30.0) == []
            assert others.alive() == shared
            assert others.wait_gone(30.0) == []
            assert client.alive() == [process.pid]
        assert process.wait(30) == -9


def noted_all(path: Path) -> bool:
    return all((path / name).exists() and noted(path, name) for name in ("own", "shared"))


# ---- how a deadline is given


@pytest.mark.parametrize(
    ("options", "ini"),
    [
        (("--harness-deadline=1",), ""),
        ((), "harness_deadline = 1"),
        (("--harness-deadline=1",), "harness_deadline = 60"),
    ],
)
def test_every_test_can_have_a_deadline(pytester: pytest.Pytester, options: tuple[str, ...], ini: str) -> None:
    pytester.makepyfile(
        """
        import time, pytest

        def test_quick(): pass
        def test_hangs(): time.sleep(60)
        @pytest.mark.harness_deadline(None)
        def test_has_none(): time.sleep(1.5)
        @pytest.mark.harness_deadline(30)
        def test_has_longer(): time.sleep(1.5)
        """
    )
    pytester.makeini(f"[pytest]\n{ini}\n")
    result, text = run(pytester, *options)
    result.assert_outcomes(passed=3, failed=1)
    assert "FAILED test_every_test_can_have_a_deadline.py::test_hangs" in text


@pytest.mark.parametrize("phase", ["setup", "teardown"])
def test_a_fixture_that_hangs_is_named(pytester: pytest.Pytester, phase: str) -> None:
    pytester.makepyfile(
        f"""
        import time, pytest

        @pytest.fixture
        def slow():
            if {phase == "setup"}: time.sleep(60)
            yield
            time.sleep(60)

        @pytest.mark.harness_deadline(1)
        def test_hangs(slow): pass
        def test_after(): pass
        """
    )
    result, text = run(pytester)
    result.assert_outcomes(passed=1 if phase == "setup" else 2, errors=1)
    assert re.search(r'File ".*", line \d+ in slow\n', text), text


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon", "1e300"])
def test_a_wrong_option_is_an_error_at_once(pytester: pytest.Pytester, given: str) -> None:
    pytester.makepyfile("def test_a(): pass")
    for options in ((f"--harness-deadline={given}",), (f"--harness-deadline={given}", "-n", "1")):
        result, text = run(pytester, *options)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        assert f"harness_deadline must be a number of seconds above 0 and at most 31622400, not '{given}'" in text


@pytest.mark.parametrize(
    "marker", ["harness_deadline", "harness_deadline(0)", "harness_deadline('a')", "harness_deadline(1, 2)"]
)
def test_a_wrong_marker_is_an_error_of_its_test(pytester: pytest.Pytester, marker: str) -> None:
    pytester.makepyfile(f"import pytest\n@pytest.mark.{marker}\ndef test_a(): pass\ndef test_b(): pass\n")
    result, text = run(pytester)
    result.assert_outcomes(passed=1, errors=1)
    assert "SpecError" in text
    assert "harness_deadline" in text


def test_a_deadline_that_nobody_watches_is_an_error(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import os, signal, pytest

        def test_kills_the_watchdog(watchdog):
            os.kill(watchdog.pid, signal.SIGKILL)
        @pytest.mark.harness_deadline(60)
        def test_needs_it(): pass
        def test_does_not(): pass
        """
    )
    result, text = run(pytester)
    result.assert_outcomes(passed=2, errors=1)
    assert "WatchdogDied" in text
    assert "ERROR at setup of test_needs_it" in text


def test_a_run_within_a_run_has_deadlines_of_its_own(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("pytest_plugins = ['pytester']")
    pytester.makepyfile(
        """
        import time, pytest

        @pytest.mark.harness_deadline(8)
        def test_outer(pytester):
            pytester.makepyfile(
                "import time, pytest\\n@pytest.mark.harness_deadline(1)\\ndef test_inner(): time.sleep(60)"
            )
            pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(failed=1)
            time.sleep(60)
        def test_after(): pass
        """
    )
    result, text = run(pytester)
    result.assert_outcomes(passed=1, failed=1)
    assert "this test hangs: its deadline of 8 s has passed" in text


def test_a_wrong_grace_is_an_error_at_once(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_a(): pass")
    pytester.makeini("[pytest]\nharness_deadline_grace_s = -1\n")
    result, text = run(pytester)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "harness_deadline_grace_s must be a number of seconds above 0" in text


def test_a_later_test_is_not_told_of_an_earlier_ones_hang(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import time, pytest

        @pytest.mark.harness_deadline(0.5)
        def test_hangs(): time.sleep(60)
        @pytest.mark.harness_deadline("soon")
        def test_has_a_wrong_marker(): pass
        @pytest.mark.harness_deadline(seconds=0.5)
        @pytest.mark.xfail
        def test_is_expected_to_fail(): time.sleep(60)
        """
    )
    result, text = run(pytester, "-rx")
    result.assert_outcomes(failed=1, errors=1, xfailed=1)
    assert text.count("harness: stacks at the deadline") == 1


@pytest.mark.parametrize("end", ["raise KeyboardInterrupt", "pytest.exit('enough')"])
def test_a_test_that_ends_the_run_has_no_deadline_any_more(pytester: pytest.Pytester, end: str) -> None:
    """It has no teardown of its own; the session's may well take longer than its deadline."""
    pytester.makeconftest(
        """
        import time

        def pytest_sessionfinish():
            time.sleep(12)
        """
    )
    pytester.makepyfile(f"import pytest\n@pytest.mark.harness_deadline(10)\ndef test_ends_it(): {end}\n")
    pytester.makeini("[pytest]\nharness_deadline_grace_s = 0.5\n")
    result, text = run(pytester)
    assert result.ret == pytest.ExitCode.INTERRUPTED, text


def test_tests_in_forked_children_are_left_alone(pytester: pytest.Pytester) -> None:
    """As pytest-forked runs them: the child has its parent's watchdog, which is not its own."""
    pytester.makeconftest(
        """
        import os
        from _pytest.runner import runtestprotocol

        def pytest_runtest_protocol(item, nextitem):
            if item.name != "test_in_a_child":
                return None
            pid = os.fork()
            if pid == 0:
                reports = runtestprotocol(item, nextitem=nextitem, log=False)
                os._exit(any(report.failed for report in reports))
            assert os.waitpid(pid, 0)[1] == 0
            return True
        """
    )
    pytester.makepyfile(test_suite="def test_uses_it(watchdog): pass\ndef test_in_a_child(): pass\n")
    for options in ((), ("--harness-deadline=60",)):
        run(pytester, *options)[0].assert_outcomes(passed=1)
        run(pytester, *options, "test_suite.py::test_in_a_child")[0].assert_outcomes()


@pytest.mark.parametrize("kind", ["file", "socket"])
def test_a_run_that_is_ended_says_so_wherever_its_standard_error_goes(pytester: pytest.Pytester, kind: str) -> None:
    """A file that a shell has opened has an offset, which others go on from."""
    suite(pytester, "hold_the_gil")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *PLAIN]
    with contextlib.ExitStack() as at_the_end:
        output = at_the_end.enter_context((pytester.path / "output").open("w+b"))
        ours, theirs = socket.socketpair()
        at_the_end.enter_context(ours)
        stderr = (output if kind == "file" else theirs).fileno()
        done = subprocess.run(command, cwd=pytester.path, stdout=output, stderr=stderr, timeout=60, check=False)
        theirs.close()
        os.write(output.fileno(), b"the shell goes on\n")
        output.seek(0)
        text = output.read() if kind == "file" else ours.recv(1 << 16)
    assert done.returncode == -9
    assert b"harness: test_suite.py::test_hangs: its deadline of 4 s has passed" in text
    assert b"in hold_the_gil" in text
    assert text.endswith(b"the shell goes on\n") == (kind == "file")
    check_nothing_is_left(pytester.path)


# ---- debuggers

DEBUGGED = """
import bdb, ctypes, os, pathlib, pdb, subprocess, sys, time
import pytest

@pytest.mark.harness_deadline(4)
def test_is_debugged(server_group):
    server = server_group.launch(["sleep", "600"])
    (pathlib.Path(__file__).parent / "pid.tmp").write_text(str(server.pid))
    (pathlib.Path(__file__).parent / "pid.tmp").rename(pathlib.Path(__file__).parent / "pid")
    DEBUG
    assert server.is_alive

def test_after(): pass
"""


@pytest.mark.parametrize(
    ("debug", "options"),
    [
        ("breakpoint()", ()),
        ("pdb.set_trace()", ("-s",)),
        ("pdb.Pdb().set_trace()", ("-s",)),  # behind pytest's back
        ("pass", ("--trace",)),
        ("assert False", ("--pdb",)),
    ],
)
def test_a_person_at_a_debugger_has_all_the_time(
    pytester: pytest.Pytester, debug: str, options: tuple[str, ...]
) -> None:
    pytester.makepyfile(test_suite=DEBUGGED.replace("DEBUG", debug))
    pytester.makeini("[pytest]\nharness_deadline_grace_s = 1\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    with subprocess.Popen(
        command, cwd=pytester.path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdin is not None
        if "--trace" in options:
            process.stdin.write("b 10\nc\n")  # to the line that follows the launch
            process.stdin.flush()
        processes.wait_for((pytester.path / "pid").exists, 30.0, "its server")
        server = int((pytester.path / "pid").read_text(encoding="utf-8"))
        with Watched([server, process.pid]) as watched:
            assert sorted(watched.wait_gone(6.0)) == sorted([server, process.pid])
        output, _ = process.communicate("c\n" * 4, timeout=30)
    assert "hangs" not in output
    assert ("2 passed" in output) == (debug != "assert False"), output


def test_a_process_that_is_traced_has_all_the_time(pytester: pytest.Pytester) -> None:
    trace = "ctypes.CDLL(None, use_errno=True).ptrace"
    seize = f"import ctypes, sys; assert {trace}(0x4206, int(sys.argv[1]), None, None) == 0; print(flush=True); input()"
    debug = f"""tracer = subprocess.Popen([sys.executable, "-c", {seize!r}, str(os.getpid())], stdin=-1, stdout=-1)
    tracer.stdout.readline()
    time.sleep(6)  # with a deadline of 4 s
    tracer.communicate(b"\\n")"""
    pytester.makepyfile(test_suite=DEBUGGED.replace("DEBUG", debug))
    run(pytester)[0].assert_outcomes(passed=2)


@pytest.mark.parametrize("is_suspended", [True, False])
def test_a_process_that_its_user_has_suspended_has_all_the_time(tmp_path: Path, *, is_suspended: bool) -> None:
    """Ctrl-Z in a shell stops the foreground group, and the shell takes the terminal back."""
    user, terminal = pty.openpty()
    marks = tmp_path / "marks"
    script = (
        f"import signal, time; signal.signal({_SIGNAL}, lambda *_: open({str(marks)!r}, 'w').close());"
        " print(flush=True)\n"
        "while True: time.sleep(0.01)"  # not signal.pause(): it loses a signal that comes just before it sleeps
    )
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(os.close, user)
        # A shell: it leads the terminal's session, and has one job in a group of its own.
        shell = subprocess.Popen(
            [sys.executable, "-c", _SHELL, script, str(int(is_suspended))],
            stdin=terminal,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        at_the_end.enter_context(shell)
        os.close(terminal)
        assert shell.stdout is not None
        job = int(shell.stdout.readline())
        at_the_end.callback(shell.kill)
        pidfd = os.pidfd_open(job)
        at_the_end.callback(os.close, pidfd)
        at_the_end.callback(signal.pidfd_send_signal, pidfd, signal.SIGKILL)
        os.kill(job, signal.SIGSTOP)
        processes.wait_for(lambda: procfs.status(job)["State"].startswith("T"), 10.0, "the job stops")
        client = ClientProcess(job, pidfd)
        assert client.is_in_use() is is_suspended
        if not is_suspended:
            client.interrupt(_SIGNAL)
            processes.wait_for(marks.exists, 10.0, "the signal's handler")


_SHELL = """
import fcntl, os, signal, subprocess, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
job = subprocess.Popen([sys.executable, "-c", sys.argv[1]], preexec_fn=os.setpgrp, stdout=subprocess.PIPE)
job.stdout.readline()
if sys.argv[2] == "0":
    os.tcsetpgrp(0, job.pid)
print(job.pid, flush=True)
job.wait()
"""


def test_a_process_that_is_traced_after_its_deadline_is_not_ended(pytester: pytest.Pytester) -> None:
    """Somebody sees that it hangs, and attaches a debugger."""
    suite(pytester, "catch_everything", grace_s=SLOW_GRACE_S)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *PLAIN]
    trace = "ctypes.CDLL(None, use_errno=True).ptrace"
    seize = f"import ctypes, sys; assert {trace}(0x4206, int(sys.argv[1]), None, None) == 0; print(flush=True); input()"
    with subprocess.Popen(command, cwd=pytester.path, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) as process:
        processes.wait_for(lambda: noted_all(pytester.path), 30.0, "its servers")
        with Watched(noted(pytester.path, "own")) as own:
            assert own.wait_gone(30.0) == []
        tracer = [sys.executable, "-c", seize, str(process.pid)]
        with subprocess.Popen(tracer, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as debugger:
            assert debugger.stdout is not None
            assert debugger.stdout.readline() == b"\n"
            with Watched([process.pid]) as client:
                assert client.wait_gone(SLOW_GRACE_S + 1.0) == [process.pid]
            debugger.communicate(b"\n")
        assert process.wait(30) == -9
