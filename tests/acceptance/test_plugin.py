"""The plugin through its front door: real pytest runs, as users start them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from faults.runs import POLITE, STUBBORN, Watched

if TYPE_CHECKING:
    from pathlib import Path

    from faults.conftest import StartRun

USES_A_SERVER = """
import sys, urllib.request
import harness

def test_server(server_group):
    server = server_group.launch([sys.executable, "-m", "http.server", "{port}"], ready=harness.http_ok("/"))
    server_group.wait_ready(timeout_s=30)
    with urllib.request.urlopen(server.url("/"), timeout=10) as answer:
        assert answer.status == 200
"""


def run(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", *options, timeout=60)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-W", "error"),
        ("-W", "error", "-n", "2"),
        ("-s",),
        ("--capture=sys",),
        ("--capture=tee-sys",),
        ("-n", "2", "--dist", "loadscope"),
        ("-p", "no:xdist"),
        ("-p", "no:faulthandler"),
    ],
    ids=" ".join,
)
def test_it_works_in_every_kind_of_run(pytester: pytest.Pytester, options: tuple[str, ...]) -> None:
    pytester.makepyfile(USES_A_SERVER)
    result = run(pytester, *options)
    result.assert_outcomes(passed=1)
    assert "warning" not in result.stdout.str().lower()


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["plain", "xdist"])
def test_it_works_by_an_import_in_a_conftest(pytester: pytest.Pytester, options: tuple[str, ...]) -> None:
    """Without the entry point, and in the same way beside it."""
    pytester.makepyfile(USES_A_SERVER)
    pytester.makeconftest("from harness.fixtures import server_group, watchdog\n")
    run(pytester, *options).assert_outcomes(passed=1)
    run(pytester, "-p", "no:harness", *options).assert_outcomes(passed=1)


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["plain", "xdist"])
def test_a_session_scoped_server_is_stopped_with_the_session(
    pytester: pytest.Pytester, options: tuple[str, ...]
) -> None:
    pytester.makeconftest(
        """
        import pathlib, sys, pytest, harness

        @pytest.fixture(scope="session")
        def shared(watchdog):
            server = watchdog.launch([sys.executable, "-m", "http.server", "{port}"], ready=harness.port_open())
            (pathlib.Path(__file__).parent / f"pid-{server.pid}").touch()
            return server.wait_ready(timeout_s=30)
        """
    )
    pytester.makepyfile(
        "def test_one(shared):\n    assert shared.is_alive\n\ndef test_two(shared):\n    test_one(shared)"
    )
    run(pytester, *options).assert_outcomes(passed=2)
    pids = [int(path.name.removeprefix("pid-")) for path in pytester.path.glob("pid-*")]
    assert pids
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_logs_are_kept_where_they_are_asked_for(pytester: pytest.Pytester, tmp_path: Path) -> None:
    pytester.makepyfile(
        """
        def test_one(server_group):
            server = server_group.launch(["sh", "-c", "echo out; echo err >&2"], name="my server")
            server.wait(timeout_s=30)
        """
    )
    run(pytester, f"--harness-log-dir={tmp_path / 'by-option'}").assert_outcomes(passed=1)
    pytester.makeini("[pytest]\nharness_log_dir = by-ini")
    run(pytester).assert_outcomes(passed=1)
    for directory in (tmp_path / "by-option", pytester.path / "by-ini"):
        (log,) = directory.glob("test_*.py_test_one--my_server-*.log")
        assert log.read_text(encoding="utf-8") == "out\nerr\n"


def test_a_wrong_setting_ends_the_run_at_once(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(USES_A_SERVER)
    for value in ("soon", "-1", "nan"):
        pytester.makeini(f"[pytest]\nharness_crash_grace_s = {value}")
        result = run(pytester)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(["*harness_crash_grace_s*"])


def test_what_prevents_a_watchdog_fails_only_the_tests_that_need_one(
    pytester: pytest.Pytester, state_dir: Path
) -> None:
    state_dir.symlink_to(pytester.path)
    pytester.makepyfile(USES_A_SERVER + "\ndef test_without():\n    pass\n")
    result = run(pytester)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*HarnessError: the state directory * is a link or a file*"])


def test_a_run_without_servers_writes_nothing(pytester: pytest.Pytester, state_dir: Path) -> None:
    pytester.makepyfile("def test_nothing():\n    pass")
    run(pytester).assert_outcomes(passed=1)
    assert not state_dir.exists() or not list(state_dir.iterdir())


def test_the_controller_of_a_distributed_run_has_no_watchdog(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        import multiprocessing

        def pytest_sessionfinish(session):
            if not hasattr(session.config, "workerinput"):
                print("children of the controller:", multiprocessing.active_children())
        """
    )
    pytester.makepyfile("def test_nothing():\n    pass")
    run(pytester, "-s").stdout.fnmatch_lines(["*children of the controller: [[]<ForkProcess name='harness-watchdog'*"])
    run(pytester, "-s", "-n", "1").stdout.fnmatch_lines(["*children of the controller: [[][]]*"])


def test_the_options_are_in_the_help(pytester: pytest.Pytester) -> None:
    run(pytester, "--help").stdout.fnmatch_lines(["*--harness-log-dir=DIR*", "*harness_crash_grace_s*"])


def test_a_forked_child_that_exits_does_not_disturb_the_watchdog(pytester: pytest.Pytester) -> None:
    """By sys.exit it runs multiprocessing's exit functions, which end daemon processes; and it fails if it launches."""
    pytester.makepyfile(
        """
        import os, sys, warnings
        import pytest
        import harness

        @pytest.mark.parametrize("leave", [sys.exit, os._exit])
        def test_fork(watchdog, server_group, leave):
            server = server_group.launch(["sleep", "100"])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
            if pid == 0:
                try:
                    watchdog.launch(["sleep", "100"])
                except harness.HarnessError as error:
                    is_clear = "forked child" in str(error) and not watchdog.is_alive
                else:
                    is_clear = False
                import atexit
                if leave is sys.exit:
                    atexit._run_exitfuncs()
                os._exit(0 if is_clear else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert watchdog.is_alive
            assert server.is_alive
            assert server_group.launch(["sleep", "100"]).is_alive
        """
    )
    run(pytester).assert_outcomes(passed=2)
    run(pytester, "-n", "1").assert_outcomes(passed=2)


def test_a_child_forked_by_a_test_may_leave_by_sys_exit_through_pytest(pytester: pytest.Pytester) -> None:
    """The SystemExit unwinds all of pytest in the child, whose teardowns and exit functions then run there."""
    pytester.makepyfile(
        """
        import os, sys, warnings

        def test_fork(server_group):
            server = server_group.launch(["sleep", "100"])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
            if pid == 0:
                sys.exit(0)
            os.waitpid(pid, 0)
            assert server.is_alive
            assert server_group.launch(["sleep", "100"]).is_alive
        """
    )
    result = run(pytester, "-p", "no:terminal")
    assert result.ret == 0


def test_a_pipe_behind_pytest_ends_with_pytest(start_run: StartRun) -> None:
    """`pytest | cat`: the watchdog, which has work for some more seconds, must not hold pytest's output open."""
    run = start_run("-p", "no:xdist", servers=[POLITE, STUBBORN], crash_grace_s=10.0, is_piped=True)
    up = run.ups()[0]
    assert run.process.stdout is not None
    with Watched([up.watchdog, *up.keepers]) as watched, run.process.stdout as output:
        os.kill(run.process.pid, signal.SIGKILL)
        output.read()
        assert up.watchdog in watched.alive(), "the output was open until the watchdog had ended"
        assert watched.wait_gone(60.0) == []


def test_xdist_sees_a_dead_worker_while_its_watchdog_still_works(start_run: StartRun) -> None:
    """A watchdog that held the worker's channel open would hide its death from the controller."""
    ending = "os.kill(os.getpid(), signal.SIGKILL)"
    run = start_run("-n", "1", "--maxfail=1", ending=ending, servers=[POLITE, STUBBORN], crash_grace_s=30.0)
    up = run.ups()[0]
    with Watched([up.watchdog]) as watched:
        assert run.end() == 1
        assert "worker 'gw0' crashed" in run.text()
        # The controller has seen it and has ended, which the watchdog takes as the run's end: its grace goes on.
        assert watched.alive() == [up.watchdog]
        os.kill(up.watchdog, signal.SIGKILL)


def test_a_plain_script_needs_no_pytest(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, harness\n"
        "with harness.Watchdog() as watchdog:\n"
        "    server = watchdog.launch([sys.executable, '-m', 'http.server', '{port}'], ready=harness.http_ok('/'))\n"
        "    server.wait_ready(timeout_s=30)\n"
        "    print(watchdog.close().outcomes[0].how)\n"
        "assert 'pytest' not in sys.modules\n",
        encoding="utf-8",
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "asked\n"


def test_no_value_of_the_environment_is_in_a_failing_tests_output(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_TOKEN", "sekrit123")
    pytester.makepyfile(
        """
        import os, signal
        def test_fail(server_group):
            server_group.launch(["/no/such/program"], env={"OTHER_TOKEN": "".join(["sek", "rit456"])})
        def test_died(server_group, watchdog):
            os.kill(watchdog.pid, signal.SIGKILL)
            server_group.launch(["sleep", "1"], env={"OTHER_TOKEN": "".join(["sek", "rit456"])})
        """
    )
    for options in ((), ("-l", "-vvv")):
        result = run(pytester, *options)
        assert "cannot execute '/no/such/program'" in result.stdout.str()
        assert "sekrit" not in result.stdout.str() + result.stderr.str()
