"""What people see of a whole run: progress, live logs, the summary, JUnit's properties, the report and its command.

The long sleeps are servers and tests that do nothing but be there; those of 0.2 s are how long a server takes to start
and to exit, so that there is something to report; that of 0.01 s waits for a file, of which a server is not told.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import processes
import pytest

from harness import procfs

if TYPE_CHECKING:
    from collections.abc import Sequence

HEAD = """
import os, signal, subprocess, sys, time
import pytest, harness

def command(code):
    return [sys.executable, "-u", "-c", code]

# Ready after a while, and takes a while to exit, so that the times in the summary are no 0.00 s. Then it stays.
SLOW = command(
    "import signal, time; signal.signal(15, lambda *_: (time.sleep(0.2), exit())); print('loading')"
    "; time.sleep(0.2); print('up'); time.sleep(600)"
)
# Ready, and gone, when RELEASE says so. A file of another process is all that there is to wait for.
HELD = command(
    "import os, signal, time"
    "\\nwhen = lambda name: [time.sleep(0.01) for _ in iter(lambda: os.path.exists(name), True)]"
    "\\nsignal.signal(15, lambda *_: (when('stop'), exit()))"
    "\\nprint('loading'); when('ready'); print('up'); time.sleep(600)"
)

"""
# A wait ends when each worker has had three words of it: however slow the machine is, they can be seen, all at once.
RELEASE = """
import os, pathlib
from harness import journal
from harness.reporting import progress

progress._EVERY_S = 0.5
heard = {"ready": 0, "stop": 0}
workers = WORKERS

def hear(event):
    if event.kind == "waiting":
        what = event.facts["what"]
        heard[what] += 1
        if heard[what] >= 3:
            pathlib.Path(f"{what}-{os.getpid()}").touch()
        if len(list(pathlib.Path().glob(f"{what}-*"))) >= workers:
            pathlib.Path(what).touch()

journal.listen(hear)
"""
LIMIT_S = 60.0
XDIST = ("-n", "2")
Ways = pytest.mark.parametrize("options", [(), XDIST], ids=["plain", "xdist"])


def make(pytester: pytest.Pytester, suite: str) -> None:
    pytester.makepyfile(test_it=HEAD + suite.replace("\n    ", "\n"))


def run(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", *options, timeout=100)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


TWO_GROUPS = """
    @pytest.mark.parametrize("number", [0, 1])
    def test_it(server_group, number):
        for rank in range(2):
            server_group.launch(SLOW, name=f"rank{rank}", ready=harness.log_line("up"), env={"TOKEN": "s3cr3t"})
        server_group.wait_ready(timeout_s=90)
    """


# ---- the summary, JUnit, the report


@Ways
def test_all_is_well_in_one_line_and_in_numbers(pytester: pytest.Pytester, options: Sequence[str]) -> None:
    make(pytester, TWO_GROUPS)
    result = run(pytester, "--junitxml=junit.xml", "--harness-report=out/report.jsonl", *options)
    result.assert_outcomes(passed=2)
    (line,) = [line for line in result.outlines if line.startswith("harness: ")]
    found = re.fullmatch(
        r"harness: 4 servers launched: 4 ended when asked; slowest start (\S+) s \('rank\d'\); slowest stop (\S+) s"
        r" \('rank\d'\); parallel stops saved (\S+) s",
        line,
    )
    assert found is not None, line
    numbers = {
        element.attrib["name"]: float(element.attrib["value"])
        for element in ET.parse(pytester.path / "junit.xml").iter("property")  # noqa: S314 - pytest wrote it
    }
    assert numbers["harness.launched"] == numbers["harness.asked"] == 4
    assert numbers["harness.leaks"] == numbers["harness.unknown"] == 0
    events = lines(pytester.path / "out" / "report.jsonl")
    assert [event["event"] for event in events].count("launched") == 4
    assert events[-1]["event"] == "summary"
    moments = [event["monotonic_s"] for event in events[:-1]]
    assert moments == sorted(moments)
    assert {event["worker"] for event in events[:-1]} == ({"gw0", "gw1"} if options else {""})
    starts = [event["seconds"] for event in events if event["event"] == "ready"]
    assert float(found[1]) == pytest.approx(max(starts), abs=0.01)
    assert numbers["harness.slowest_start_s"] == pytest.approx(max(starts))
    saved = sum(event["one_by_one_s"] - event["seconds"] for event in events if event["event"] == "stopped")
    assert float(found[3]) == pytest.approx(saved, abs=0.01)
    assert saved > 0
    assert "s3cr3t" not in (pytester.path / "out" / "report.jsonl").read_text(encoding="ascii")
    runs = pytester.path / "state" / "runs"
    assert not list(runs.rglob("events-*")), "what workers wrote for the controller is left"


@pytest.mark.parametrize(
    ("options", "shown"), [(["-q"], False), (["-v"], True), (["-p", "no:terminal"], False), ([], True)]
)
def test_how_much_is_said(pytester: pytest.Pytester, options: Sequence[str], shown: bool) -> None:  # noqa: FBT001
    make(pytester, TWO_GROUPS)
    result = run(pytester, *options)
    assert result.ret == 0
    assert ("4 launched: 4" in result.stdout.str()) == ("-v" in options)
    assert ("4 servers launched: 4" in result.stdout.str()) == (shown and "-v" not in options)


def test_a_run_without_servers_says_nothing(pytester: pytest.Pytester) -> None:
    make(pytester, "def test_it(): pass")
    result = run(pytester, "--junitxml=junit.xml", "-v")
    result.assert_outcomes(passed=1)
    assert "harness" not in "".join(line for line in result.outlines if not line.startswith("plugins:"))
    assert "harness" not in (pytester.path / "junit.xml").read_text(encoding="utf-8")


def test_what_went_wrong_is_said_also_quietly(pytester: pytest.Pytester) -> None:
    suite = """
    @pytest.fixture(scope="module")
    def shared(watchdog):
        return watchdog.launch(["sleep", "600"], name="shared")

    def test_dies(shared):
        os.kill(shared.pid, signal.SIGKILL)
        shared.proc.wait(30)

    def test_after(watchdog):
        watchdog.launch(command("import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(60)"),
            name="stubborn", ready=harness.log_line("up"), grace_s=0.1).wait_ready(30).stop()  # it stays, asked or not
    """
    make(pytester, suite)
    result = run(pytester, "-q")
    result.stdout.fnmatch_lines(
        [
            "=* harness: servers =*",
            "servers * 2 launched: 1 killed, 1 ended by itself, 1 of them DIED",
            "DIED: server 'shared': killed by SIGKILL [[]in test_it.py::test_dies]",
        ]
    )


@Ways
def test_the_servers_of_a_process_that_dies_are_not_forgotten(
    pytester: pytest.Pytester, options: Sequence[str]
) -> None:
    suite = """
    def test_dies(server_group):
        server_group.launch(["sleep", "600"], name="own")
        os.kill(os.getpid(), signal.SIGKILL)

    def test_lives(server_group):
        server_group.launch(["sleep", "600"], name="other")
    """
    make(pytester, suite)
    result = run(pytester, "--harness-report=report.jsonl", *options)
    events = lines(pytester.path / "report.jsonl")
    launched = {event["server"] for event in events if event["event"] == "launched"}
    assert "own" in launched
    if options:
        result.stdout.fnmatch_lines(["UNKNOWN END: server 'own' (pid *) [[]in test_it.py::test_dies, on gw*]"])
        assert launched == {"own", "other"}


def test_a_controller_that_is_killed_leaves_a_report(pytester: pytest.Pytester) -> None:
    suite = """
    def test_it(server_group):
        server_group.launch(["sleep", "600"], name="own")
        time.sleep(600)  # until this worker is ended
    """
    make(pytester, suite)
    report = pytester.path / "report.jsonl"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--harness-report=report.jsonl", "-n", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as controller:
        try:
            processes.wait_for(lambda: report.exists() and b"launched" in report.read_bytes(), LIMIT_S, "the launch")
        finally:
            left = processes.identities(processes.tree(controller.pid))
            controller.kill()
    processes.wait_gone(left, LIMIT_S)
    shown = subprocess.run(
        [sys.executable, "-m", "harness", "report", str(report)], check=False, capture_output=True, text=True
    )
    assert shown.returncode == 1
    assert "UNKNOWN END: server 'own'" in shown.stdout


def test_a_child_that_a_test_forks_writes_no_report(pytester: pytest.Pytester) -> None:
    suite = """
    def test_it(server_group):
        server_group.launch(["sleep", "600"], name="own")
        if os.fork() == 0:
            sys.exit(0)  # which leaves through all of pytest
        os.wait()
        server_group.launch(["sleep", "600"], name="after")
    """
    make(pytester, suite)
    result = run(pytester, "-W", "ignore", "--harness-report=report.jsonl", "--harness-live-logs")
    assert result.ret == 0
    events = [(event["event"], event.get("server")) for event in lines(pytester.path / "report.jsonl")]
    assert [server for event, server in events if event == "launched"] == ["own", "after"]
    assert [event for event, _ in events].count("summary") == 1


@pytest.mark.parametrize("path", ["a-file/report", ".", "unread"])
def test_a_report_that_cannot_be_written_is_a_usage_error(pytester: pytest.Pytester, path: str) -> None:
    make(pytester, "def test_it(): pass")
    (pytester.path / "a-file").touch()
    os.mkfifo(pytester.path / "unread")
    result = run(pytester, f"--harness-report={path}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --harness-report: cannot write *"])


def test_a_setting_names_the_report_and_a_device_may_be_one(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nharness_report = report.jsonl")
    make(pytester, TWO_GROUPS)
    assert run(pytester, "-q").ret == 0
    assert lines(pytester.path / "report.jsonl")[-1]["launched"] == 4
    assert run(pytester, "-q", "--harness-report=/dev/null").ret == 0
    assert not Path(os.devnull).is_file()


def test_a_report_that_is_there_is_replaced_by_a_run_alone(pytester: pytest.Pytester) -> None:
    make(pytester, TWO_GROUPS)
    real, link = pytester.path / "real.jsonl", pytester.path / "link.jsonl"
    real.write_text("of an earlier run")
    real.chmod(0o640)
    link.symlink_to(real)
    for option in ("--help", "--collect-only"):
        run(pytester, "--harness-report=link.jsonl", option)
        assert real.read_text(encoding="ascii") == "of an earlier run"
    run(pytester, "--harness-report=link.jsonl")
    assert link.is_symlink()
    assert lines(real)[-1]["launched"] == 4
    assert real.stat().st_mode & 0o777 == 0o640


def test_the_standard_output_may_be_the_report_and_stays_what_it_is(pytester: pytest.Pytester) -> None:
    make(pytester, TWO_GROUPS)
    (pytester.path / "link").symlink_to("/proc/self/fd/1")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:terminal", "--harness-report=link"]
    with (pytester.path / "out").open("wb") as output:
        subprocess.run(command, check=True, stdout=output)
    assert (pytester.path / "link").is_symlink()
    assert lines(pytester.path / "out")[-1]["launched"] == 4


@Ways
def test_a_test_that_moves_the_state_directory_loses_no_event(
    pytester: pytest.Pytester, options: Sequence[str]
) -> None:
    suite = """
    @pytest.fixture(scope="module")
    def shared(watchdog):
        return watchdog.launch(["sleep", "600"], name="shared")

    def test_it(shared, monkeypatch, tmp_path):
        monkeypatch.setenv("HARNESS_STATE_DIR", str(tmp_path / "mine"))
        shared.stop()
        assert not list(tmp_path.iterdir())
    """
    make(pytester, suite)
    result = run(pytester, *options)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["harness: 1 server launched: 1 ended when asked; *"])


def test_what_a_user_gives_a_check_is_not_written(pytester: pytest.Pytester) -> None:
    suite = """
    import functools

    def never(server, token):
        return False

    def test_it(watchdog):
        with watchdog.launch(["sleep", "600"], ready=functools.partial(never, token="s3cr3t")) as server:
            with pytest.raises(harness.NotReady):
                server.wait_ready(timeout_s=1.5)
        def fails(server):
            raise RuntimeError("the token s3cr3t is refused")

        with watchdog.launch(["sleep", "600"], ready=fails) as server:
            with pytest.raises(harness.NotReady):
                server.wait_ready(timeout_s=60)
        with watchdog.launch(["sleep", "600"], ready=harness.http_ok("/h?key=s3cr3t")) as server:
            with pytest.raises(harness.NotReady):
                server.wait_ready(timeout_s=1.5)
    """
    pytester.makeconftest("from harness.reporting import progress; progress._EVERY_S = 0.5")
    make(pytester, suite)
    result = run(pytester, "--harness-report=report.jsonl")
    result.stdout.fnmatch_lines(["harness: * s of 1.5 s until ready: * | never: *"])
    assert "s3cr3t" not in result.stdout.str()
    reasons = [event["reason"] for event in lines(pytester.path / "report.jsonl") if event["event"] == "not_ready"]
    assert "waiting for never" in reasons[0]
    assert reasons[1].endswith("s: RuntimeError")
    assert "s3cr3t" not in (pytester.path / "report.jsonl").read_text(encoding="ascii")


def test_a_child_that_is_forked_while_a_thread_stops_a_server_does_not_hang(pytester: pytest.Pytester) -> None:
    suite = """
    import threading
    from harness import journal

    def test_it():
        over = threading.Event()

        def speak():
            while not over.is_set():
                journal.note("word", server="s")

        thread = threading.Thread(target=speak)
        thread.start()
        for _ in range(50):
            if (pid := os.fork()) == 0:
                signal.alarm(30)  # or a child that hangs would
                journal.note("word", server="s")
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        over.set()
        thread.join()
    """
    make(pytester, suite)
    run(pytester, "-W", "ignore", "--harness-report=report.jsonl").assert_outcomes(passed=1)


def test_the_command_sums_up_a_report(pytester: pytest.Pytester) -> None:
    make(pytester, TWO_GROUPS)
    run(pytester, "-q", "--harness-report=report.jsonl")
    report = pytester.path / "report.jsonl"
    torn = report.read_bytes()[:-30]

    def shown(*arguments: str, data: bytes = b"") -> tuple[int, str]:
        command = [sys.executable, "-m", "harness", "report", *arguments]
        done = subprocess.run(command, check=False, input=data, capture_output=True)
        return done.returncode, (done.stdout or done.stderr).decode()

    status, text = shown(str(report))
    assert (status, text.splitlines()[0]) == (0, "servers         4 launched: 4 ended when asked")
    assert shown("-", data=torn) == (0, text)
    status, text = shown("--json", str(report))
    assert json.loads(text)["launched"] == 4
    assert shown(str(report / "x"))[0] == 2
    assert "holds no event" in shown("-", data=b"text\n")[1]
    assert shown("-", data=b"")[0] == 0  # a run without servers


# ---- progress


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["plain", "xdist"])
def test_elsewhere_than_on_a_terminal_a_line_comes_now_and_then(
    pytester: pytest.Pytester, options: Sequence[str]
) -> None:
    pytester.makeconftest(RELEASE.replace("WORKERS", "1"))
    suite = """
    def test_it(server_group):
        server_group.launch(HELD, name="model", ready=harness.log_line("up"), grace_s=60)
        server_group.wait_ready(timeout_s=90)
        assert False
    """
    make(pytester, suite)
    result = run(pytester, *options)
    worker = "gw0: " if options else ""
    result.stdout.fnmatch_lines(
        [
            f"harness: {worker}* s of 90 s until ready: 'model' | loading | a log line that matches 'up': *",
            f"harness: {worker}* s of 90 s until ready: 'model' | loading | *",
            f"harness: {worker}* s of 60 s for the stop of 'model' | up | exit after SIGTERM",
            f"harness: {worker}* s of 60 s for the stop of 'model' | up | exit after SIGTERM",
            "=* FAILURES =*",
        ]
    )
    for released in [path for path in pytester.path.iterdir() if path.name.startswith(("ready", "stop"))]:
        released.unlink()
    quiet = run(pytester, "-q", *options)
    assert (pytester.path / "stop").exists(), "words were said"
    assert " s of 90 s" not in quiet.stdout.str()


@Ways
def test_on_a_terminal_one_line_moves_and_goes(pytester: pytest.Pytester, options: Sequence[str]) -> None:
    pytester.makeconftest(RELEASE.replace("WORKERS", "2" if options else "1"))
    make(pytester, TWO_GROUPS.replace("SLOW", "HELD"))
    columns = 300 if options else 100
    text = on_a_terminal([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options], columns)
    moving = re.findall(r"\x1bD\x1bM\x1b7\x1bD\rharness: (.*?)\x1b\[K\x1b8", text)
    ready = [line for line in moving if " s of 90 s until ready: 'rank0', 'rank1' | loading" in line]
    assert len(ready) >= 2, moving
    assert all(len(line) + len("harness: ") < columns for line in moving), "it would be wrapped"
    if options:
        assert [line for line in moving if "gw0: " in line and "gw1: " in line]
    # What moved has been removed, and nothing else is in pytest's way.
    assert text.count("\x1b7\x1bD\r\x1b[K\x1b8") >= 1
    assert text.rindex("\x1b7\x1bD\r\x1b[K\x1b8") > text.rindex(" s of 90 s until ready")
    plain = re.sub(r"\x1bD\x1bM\x1b7.*?\x1b8|\x1b7.*?\x1b8|\x1b\[[0-9;]*m", "", text)
    assert "\x1b" not in plain
    assert "2 passed" in plain


def on_a_terminal(command: list[str], columns: int) -> str:
    """Run a command on a terminal, and give what it wrote."""
    master, slave = pty.openpty()
    with open(master, "rb", buffering=0) as screen:
        with open(slave, "rb", buffering=0):
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            environment = {**os.environ, "TERM": "xterm"}
            process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
        written = b""
        with process, contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
            while data := screen.read(1 << 16):
                written += data
    return written.decode()


# ---- live logs


@pytest.mark.parametrize(
    "options", [["--harness-live-logs"], ["-s"], ["--harness-live-logs", *XDIST], ["-s", *XDIST]], ids=" ".join
)
def test_logs_are_shown_while_servers_write(pytester: pytest.Pytester, options: list[str]) -> None:
    make(pytester, TWO_GROUPS)
    result = run(pytester, *options)
    result.assert_outcomes(passed=2)
    shown = [line for line in result.outlines if re.search(r"\[(gw\d )?rank\d\] ", line)]
    assert len([line for line in shown if line.endswith("] loading")]) == 4
    assert len([line for line in shown if line.endswith("] up")]) == 4
    assert ("[gw0 rank0] up" in result.stdout.str()) == ("-n" in options)
    ends = [number for number, line in enumerate(result.outlines) if line.startswith("harness: ")]
    assert max(number for number, line in enumerate(result.outlines) if line in shown) < min(ends)


def test_they_are_not_shown_unasked_and_the_setting_asks(pytester: pytest.Pytester) -> None:
    make(pytester, TWO_GROUPS)
    assert "loading" not in run(pytester).stdout.str()
    pytester.makeini("[pytest]\nharness_live_logs = true")
    assert "[rank0] loading" in run(pytester).stdout.str()


def running(root: int, program: str) -> list[processes.Identity]:
    """Give the descendants of a process that run a program."""
    found = processes.identities(processes.tree(root))
    return [one for one in found if program in procfs.command_line(one.pid)]


def test_who_shows_them_ends_with_a_run_that_is_killed(pytester: pytest.Pytester) -> None:
    suite = """
    def test_it(server_group):
        server_group.launch(SLOW, name="own", ready=harness.log_line("up")).wait_ready(30)
        os.fork()  # a child that keeps open what this process had
        time.sleep(600)  # until both are killed
    """
    make(pytester, suite)
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-p", "no:cacheprovider", "--harness-live-logs"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            shown = b""
            while b"] up" not in shown:
                shown += process.stdout.readline()
            # It forks when it is ready, which is shown before.
            processes.wait_for(lambda: bool(running(process.pid, "-m pytest")), LIMIT_S, "the child")
            (child,) = running(process.pid, "-m pytest")
            found = processes.identities(processes.tree(process.pid))
            followers = running(process.pid, "follower.py")
            assert len(followers) == 1
        finally:
            process.kill()
    try:
        processes.wait_gone(followers, LIMIT_S)
    finally:
        os.kill(child.pid, signal.SIGKILL)
    processes.wait_gone(found, LIMIT_S)
