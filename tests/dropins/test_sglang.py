"""SGLang's functions: its signatures, on servers whose launcher goes first."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import processes
import pytest
from dropins.conftest import assert_listens_nobody
from servers.commands import FOLDER, READY_S

import harness
from harness import sglang, subtrees
from harness.sglang import kill_process_tree, popen_launch_server, terminate_and_kill_process_tree

if TYPE_CHECKING:
    from collections.abc import Callable

PROGRAM = [sys.executable, "-I", "-S", str(FOLDER / "sglang_serve.py")]


@pytest.fixture(autouse=True)
def program(own: harness.Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang, "COMMAND", PROGRAM)
    monkeypatch.setattr(sglang, "PD_COMMAND", PROGRAM)
    del own


@pytest.fixture
def base_url(own: harness.Watchdog) -> str:
    """Give where a server may listen: a port that nobody else is given while a server of this test has it."""
    holder = own.launch(["sleep", "600"])  # until the watchdog is closed
    return holder.url()


def tree_of(pid: int) -> list[processes.Identity]:
    return processes.identities([pid, *processes.tree(pid)])


def wait_for_scheduler(server: harness.Server) -> None:
    processes.wait_for(lambda: "scheduler is up" in server.log_tail(), READY_S, "the scheduler is up")


def test_a_server_is_launched_and_ended_as_in_sglangs_suite(base_url: str, own: harness.Watchdog) -> None:
    process = popen_launch_server("a/model", base_url, READY_S, other_args=["--num-replicas", 2])
    assert process.poll() is None
    server = own.servers[-1]
    assert server.url() == base_url
    wait_for_scheduler(server)
    people = tree_of(process.pid)
    terminate_and_kill_process_tree(process)
    assert not [who for who in people if processes.is_running(who)]
    assert (process.poll(), server.outcome and server.outcome.how) == (0, "asked")
    port = base_url.rpartition(":")[2]
    args = f"--model-path a/model --num-replicas 2 --host 127.0.0.1 --port {port}"
    assert f"stdout: {args}\n" in server.log_tail() + "\n"
    assert "stderr: patience 120" in server.log_tail()


def test_the_launcher_goes_first_and_its_scheduler_does_not_stay(base_url: str) -> None:
    """Upstream returned after 0.01 s, and the scheduler lived on."""
    process = popen_launch_server("m", base_url, READY_S, other_args=["--stubborn"])
    people = tree_of(process.pid)
    assert len(people) == 2
    terminate_and_kill_process_tree(process, terminate_timeout=5.0)
    assert process.poll() == 0
    assert not [who for who in people if processes.is_running(who)]


@pytest.mark.parametrize("options", [["--stubborn"], ["--daemon", "--stubborn"], []])
def test_a_tree_is_killed_whole(base_url: str, options: list[str], own: harness.Watchdog) -> None:
    process = popen_launch_server("m", base_url, READY_S, other_args=options)
    server = own.servers[-1]
    wait_for_scheduler(server)
    people = processes.identities(server.pids())
    kill_process_tree(process.pid)
    assert not [who for who in people if processes.is_running(who)]
    assert process.poll() == -9
    kill_process_tree(process.pid)  # as often as one likes
    terminate_and_kill_process_tree(process)


def test_a_tree_is_killed_whose_launcher_has_exited(base_url: str, own: harness.Watchdog) -> None:
    process = popen_launch_server("m", base_url, READY_S, other_args=["--stubborn"])
    people = tree_of(process.pid)
    process.terminate()
    process.wait(READY_S)
    assert own.servers[-1].state == "detached"
    assert [processes.is_running(who) for who in people] == [False, True]
    kill_process_tree(process.pid)
    assert not processes.is_running(people[1])


def test_who_may_not_wait_does_not(base_url: str, own: harness.Watchdog) -> None:
    process = popen_launch_server("m", base_url, READY_S, other_args=["--stubborn"])
    people = tree_of(process.pid)
    kill_process_tree(process.pid, wait_timeout=None)
    processes.wait_gone(people, READY_S)
    own.servers[-1].wait(READY_S)


def test_children_alone_are_killed(base_url: str) -> None:
    process = popen_launch_server("m", base_url, READY_S, other_args=["--stubborn"])
    launcher, scheduler = tree_of(process.pid)
    kill_process_tree(process.pid, include_parent=False, skip_pid=scheduler.pid)
    assert processes.is_running(scheduler)
    kill_process_tree(process.pid, include_parent=False)
    assert [processes.is_running(who) for who in (launcher, scheduler)] == [True, False]
    kill_process_tree(process.pid)


def test_a_process_of_the_tests_own_is_ended_with_its_tree() -> None:
    command = ["sh", "-c", "sleep 600 & echo ready; wait"]
    ends: list[Callable[[subprocess.Popen[bytes]], None]] = [
        terminate_and_kill_process_tree,
        lambda process: kill_process_tree(process.pid),
    ]
    for end in ends:
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            people = tree_of(process.pid)
            end(process)
            processes.wait_gone(people, READY_S)


def test_a_process_of_the_tests_own_that_has_ended_is_reaped() -> None:
    with subprocess.Popen(["/bin/true"]) as process:
        processes.wait_for(lambda: process.pid in processes.zombies(os.getpid()), READY_S, "it has ended")
        terminate_and_kill_process_tree(process)
        assert process.returncode == 0
    child = multiprocessing.get_context("fork").Process(target=signal.pause)
    child.start()
    terminate_and_kill_process_tree(child)
    assert child.exitcode == -signal.SIGTERM
    child.close()


def test_a_number_that_was_given_away_is_not_struck(monkeypatch: pytest.MonkeyPatch) -> None:
    strike = subtrees._strike
    struck: list[tuple[int, int]] = []

    def note(pid: int, start_time: int) -> bool:
        struck.append((pid, start_time))
        return strike(pid, start_time + 1) if len(struck) == 1 else strike(pid, start_time)

    monkeypatch.setattr(subtrees, "_strike", note)
    with subprocess.Popen(["/bin/sleep", "600"]) as process:
        who = processes.identify(process.pid)
        assert who is not None
        subtrees.kill(process.pid, wait_s=None)
        assert struck == [(who.pid, who.start_time)]
        assert process.poll() is None  # another process that had its number
        subtrees.kill(process.pid, wait_s=READY_S)


def test_nobody_elses_process_is_touched(own: harness.Watchdog) -> None:
    with pytest.raises(harness.SpecError, match="process 1 was not started by this process"):
        kill_process_tree(1)
    server = own.launch(["sleep", "600"])
    keeper = processes.parent(server.pid)
    for pid in (own.pid, keeper):
        with pytest.raises(harness.SpecError, match="is the harness's own"):
            kill_process_tree(pid)
    kill_process_tree(1 << 22)  # there is none: as upstream has it, nothing is to be done


def test_none_means_all_that_this_process_has_started(run_script: Callable[..., str]) -> None:
    said = run_script(
        f"""
        import os, subprocess
        from harness import current, sglang
        sglang.COMMAND = {PROGRAM!r}
        port = current.watchdog().launch(["sleep", "600"]).port
        process = sglang.popen_launch_server("m", f"http://127.0.0.1:{{port}}", {READY_S}, other_args=["--stubborn"])
        own = subprocess.Popen(["sleep", "600"])
        sglang.kill_process_tree(None)
        print(process.poll(), own.wait(), current.watchdog().is_alive)
        print([server.is_alive for server in current.watchdog().servers])
        """
    )
    assert said == "-9 -9 True\n[False, False]\n"


def test_a_server_that_fails_is_not_waited_for(base_url: str, own: harness.Watchdog) -> None:
    with pytest.raises(harness.ServerExited, match="exit code 2") as caught:
        popen_launch_server("m", base_url, 600.0, other_args=["--unknown"])
    assert "unrecognized arguments: --unknown" in str(caught.value)
    assert not own.servers[-1].is_alive


def test_one_that_is_not_ready_in_time_is_stopped(base_url: str, own: harness.Watchdog) -> None:
    with pytest.raises(TimeoutError, match=r"was not ready after 0\.5 s") as caught:
        popen_launch_server("m", base_url, 0.5, other_args=["--hang", "--stubborn"])
    assert isinstance(caught.value, harness.NotReady)
    assert own.servers[-1].pids() == []
    assert_listens_nobody(int(base_url.rpartition(":")[2]))


def test_the_key_is_sent_with_the_health_check(base_url: str, own: harness.Watchdog) -> None:
    process = popen_launch_server("m", base_url, READY_S, api_key="secret")
    terminate_and_kill_process_tree(process)
    assert "secret" not in repr(own.servers[-1].ready)


def test_one_that_fails_offline_is_launched_online(base_url: str, own: harness.Watchdog) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "CI_OFFLINE_MARK": "x"}
    process = popen_launch_server("m", base_url, READY_S, other_args=["--fail-offline"], env=offline)
    first, second = own.servers[-2:]
    assert (first.returncode, second.is_alive) == (1, True)
    environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    assert b"HF_HUB_OFFLINE=0" in environment
    assert not [entry for entry in environment if entry.startswith(b"CI_OFFLINE_")]
    kill_process_tree(process.pid)
    with pytest.raises(harness.ServerExited):
        popen_launch_server("m", base_url, READY_S, other_args=["--unknown"], env=offline)


def test_both_outputs_are_copied_to_files_of_the_test(base_url: str, tmp_path: Path, own: harness.Watchdog) -> None:
    output, errors = io.StringIO(), (tmp_path / "stderr").open("w+", encoding="utf-8")
    with errors:
        process = popen_launch_server("m", base_url, READY_S, return_stdout_stderr=(output, errors))
        wait_for_scheduler(own.servers[-1])
        terminate_and_kill_process_tree(process)
        errors.seek(0)
        written = errors.read()
    assert output.getvalue().startswith("stdout: --model-path m")
    assert "scheduler is up" in output.getvalue()
    assert "stderr: patience 120\n" in written
    assert "stdout" not in written


def test_an_error_has_the_tail_of_both_outputs(base_url: str) -> None:
    files = (io.StringIO(), io.StringIO())
    with pytest.raises(harness.ServerExited) as caught:
        popen_launch_server("m", base_url, READY_S, other_args=["--unknown"], return_stdout_stderr=files)
    assert "unrecognized arguments: --unknown" in str(caught.value)


@pytest.mark.parametrize("url", ["127.0.0.1:1", "http://127.0.0.1", "https://127.0.0.1:1", "http://a:b", "http://:1"])
def test_a_url_that_cannot_be_is_refused(url: str, own: harness.Watchdog) -> None:
    with pytest.raises(harness.SpecError, match="base_url must be like"):
        popen_launch_server("m", url, READY_S)
    assert own.servers == ()


def test_files_of_a_server_that_cannot_be_launched_are_let_go(base_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang, "COMMAND", ["nul\0"])
    with pytest.raises(harness.SpecError, match="NUL"):
        popen_launch_server("m", base_url, READY_S, return_stdout_stderr=(io.StringIO(), io.StringIO()))


def test_a_port_that_is_taken_says_by_whom(base_url: str, own: harness.Watchdog) -> None:
    process = popen_launch_server("m", base_url, READY_S)
    with pytest.raises(harness.HarnessError, match=f"pid {process.pid}|a process that is not this server's|exit code"):
        popen_launch_server("m", base_url, READY_S)
    assert process.poll() is None
    kill_process_tree(process.pid)
    del own


_UNITTEST = f"""
import unittest
from harness import sglang
from harness.sglang import kill_process_tree, popen_launch_server

sglang.COMMAND = {PROGRAM!r}


class TestServer(unittest.TestCase):
    other_args = []

    @classmethod
    def setUpClass(cls):
        cls.process = popen_launch_server("m", "http://127.0.0.1:@PORT@", 60, other_args=cls.other_args)

    @classmethod
    def tearDownClass(cls):
        kill_process_tree(cls.process.pid)

    def test_a(self):
        self.assertIsNone(self.process.poll())


class TestAfterwards(TestServer):
    other_args = ["--stubborn"]


class TestBroken(TestServer):
    other_args = ["--unknown"]
"""


@pytest.mark.parametrize("runner", ["unittest", "pytest"])
def test_classes_of_unittest_use_one_port_after_another(runner: str, tmp_path: Path, base_url: str) -> None:
    path = tmp_path / "test_classes.py"
    path.write_text(_UNITTEST.replace("@PORT@", base_url.rpartition(":")[2]), encoding="utf-8")
    options = ["-v"] if runner == "unittest" else ["-v", "-p", "no:cacheprovider"]
    environment = {**os.environ, "HARNESS_STATE_DIR": str(tmp_path / "state")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", runner, *options, path.name],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert said.count("exit code 2") >= 1
    if runner == "pytest":
        assert "2 passed, 1 error" in said
    else:
        assert "Ran 2 tests" in said
        assert "FAILED (errors=1)" in said


def test_it_is_quick_to_import() -> None:
    """It imports neither SGLang nor a library of its clients."""
    code = "import sys, harness.sglang, harness.vllm; print([m for m in sys.modules if m in ('torch','openai','vllm')])"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n", time.monotonic() - began
