"""What the report of a failing test says of its servers.

The long sleeps are servers that do nothing; of the short ones each says what it is for.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from harness.reporting import oom

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

XDIST = ("-n", "2")
SAYS = """
import os, signal, sys, time
import pytest
import harness

def command(code):
    return [sys.executable, "-I", "-S", "-u", "-c", code]

TALKER = command("import sys\\nprint('ready')\\nfor line in sys.stdin: pass")
"""
# A server that says what it finds in a file, and ends as that says.
FOLLOWER = """
import os, time

print("ready")
said = 0
while True:
    lines = open("orders").read().split("\\n")[:-1] if os.path.exists("orders") else []
    for line in lines[said:]:
        if line == "exit":
            os._exit(3)
        if line == "kill":
            os.kill(os.getpid(), 9)
        print(line)
    said = len(lines)
    time.sleep(0.01)  # the file is written by the test: there is nothing else to wait for
"""
SHARED = """
def order(server, word, wait=True):
    with open("orders", "a") as file:
        file.write(word + "\\n")
    while wait and word not in server.log_tail(100):
        time.sleep(0.01)  # the log is written by the server

@pytest.fixture(scope="session")
def shared(watchdog):
    follower = [sys.executable, "-I", "-S", "-u", "follower.py"]
    with watchdog.launch(follower, name="shared", ready=harness.log_line("ready")) as server:
        yield server.wait_ready(timeout_s=30)
"""


def run(pytester: pytest.Pytester, suite: str, *options: str) -> tuple[pytest.RunResult, dict[str, str]]:
    """Run a suite, and give its result with the text of each section of the harness, by its title."""
    pytester.makepyfile(follower=FOLLOWER, test_it=SAYS + SHARED + suite)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *options, timeout=100)
    return result, sections(result.outlines)


def seconds(pattern: str, text: str) -> float:
    """Give the time that a section says in a place that must be there."""
    found = re.search(pattern, text, re.MULTILINE)
    assert found is not None, text
    return float(found[1])


def sections(lines: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    title = ""
    for line in lines:
        if heading := re.match(r"-+ (harness: server .*?) -+$", line):
            title = heading[1]
            found[title] = ""
        elif re.match(r"[-=_]{5,}|^_+ ", line):
            title = ""
        elif title:
            found[title] += line + "\n"
    return found


@pytest.mark.parametrize("options", [(), XDIST], ids=["plain", "xdist"])
def test_each_server_that_the_test_used_has_a_section(pytester: pytest.Pytester, options: tuple[str, ...]) -> None:
    suite = """
    def test_passes(shared):
        order(shared, "before")

    def test_fails(shared, server_group):
        own = server_group.launch(["sleep", "600"], name="own", ports=["admin"])
        order(shared, "meanwhile")
        assert False

    def test_other(watchdog):
        assert False, "it has no server"
    """.replace("\n    ", "\n")
    result, found = run(pytester, suite, *options, *(["--dist", "loadfile"] if options else []))
    result.assert_outcomes(passed=1, failed=2)
    assert list(found) == ["harness: server 'shared': running", "harness: server 'own': running"]
    shared, own = found.values()
    assert re.search(r"^state    running, up \d+\.\d\d s$", shared, re.MULTILINE)
    assert re.search(r"^root     pid \d+; ports: port \d+$", shared, re.MULTILINE)
    assert "ready    ready, waiting for a log line that matches 'ready'" in shared
    assert re.search(r"^         after +\d+\.\d\d s: ready$", shared, re.MULTILINE)
    assert "(the last 3 lines; '>': written during this test)\n  | ready\n  | before\n> | meanwhile\n" in shared
    assert re.search(r"ports: .*admin \d+", own)
    assert "ready    nothing was waited for" in own
    assert ".log (empty)" in own


def test_a_start_that_fails_says_what_was_awaited_and_what_was_seen(pytester: pytest.Pytester) -> None:
    suite = """
    def test_not_ready(watchdog):
        loads = command("print('loading'); import time; time.sleep(600)")
        server = watchdog.launch(loads, ready=harness.log_line("up"), name="slow")
        while "loading" not in server.log_tail():
            time.sleep(0.01)  # nothing announces what another process prints
        server.wait_ready(timeout_s=0.5)

    @pytest.fixture
    def fails(watchdog):
        # It lives long enough that the time it was up is no 0.00 s.
        code = "import time; print('no such model'); time.sleep(0.3); raise SystemExit(4)"
        return watchdog.launch(command(code), ready=harness.port_open(), name="exits").wait_ready(timeout_s=30)

    def test_exits(fails):
        pass
    """.replace("\n    ", "\n")
    result, found = run(pytester, suite)
    result.assert_outcomes(failed=1, errors=1)
    slow = found["harness: server 'slow': running"]
    assert "ready    NOT ready (at most 0.5 s), waiting for a log line that matches 'up'" in slow
    # Each time against another of the same section: how long anything takes is the machine's affair.
    assert (
        0.5 <= seconds(r"^         after +(\S+) s: was not ready after 0\.5 s", slow) <= seconds(r", up (\S+) s$", slow)
    )
    assert "> | loading" in slow
    exits = found["harness: server 'exits': DIED during this test: exit code 4"]
    assert "NOT ready (at most 30 s), waiting for port of the server to be open" in exits
    up_s = seconds(r"^state    gone, up (\d+\.\d\d) s, exit code 4, exited \d+\.\d\d s ago$", exits)
    assert 0 < up_s <= seconds(r"^         after +(\S+) s: it ended with exit code 4$", exits)
    assert "> | no such model" in exits


@pytest.mark.parametrize(("word", "end"), [("exit", "exit code 3"), ("kill", "SIGKILL")])
def test_a_server_that_dies_is_named_in_the_test_during_which_it_died(
    pytester: pytest.Pytester, word: str, end: str
) -> None:
    suite = f"""
    def test_during(shared, server_group):
        server_group.launch(["sleep", "600"], name="own")
        order(shared, "{word}", wait=False)
        shared.proc.wait(30)
        assert False, "connection refused"

    def test_after(shared):
        assert False, "connection refused"
    """.replace("\n    ", "\n")
    result, found = run(pytester, suite)
    result.assert_outcomes(failed=2)
    titles = list(found)
    assert [re.sub(r"killed by |signal \d+ \(|\)", "", title) for title in titles] == [
        f"harness: server 'shared': DIED during this test: {end}",
        "harness: server 'own': running",
        f"harness: server 'shared': DIED before this test: {end}",
    ]
    assert "nothing of it was written during this test" in found[titles[2]]


@pytest.mark.parametrize("strict", [False, True])
def test_a_test_that_passes_warns_of_the_death_of_a_shared_server(pytester: pytest.Pytester, strict: bool) -> None:  # noqa: FBT001
    suite = """
    def test_during(shared):
        order(shared, "exit", wait=False)
        shared.proc.wait(30)

    def test_after():
        pass
    """.replace("\n    ", "\n")
    result, _ = run(pytester, suite, *(["-W", "error"] if strict else []))
    if strict:
        result.assert_outcomes(passed=2, errors=1)
        result.stdout.fnmatch_lines(
            [
                "server 'shared': DIED during this test: exit code 3 (its log: *",
                "ERROR *::test_during - *.ServerDied: *",
            ]
        )
    else:
        result.assert_outcomes(passed=2, warnings=1)
        result.stdout.fnmatch_lines(
            ["*ServerDied: server 'shared': DIED during this test: exit code 3 (its log: *.log)*"]
        )


def test_an_end_that_the_test_wanted_is_no_death(pytester: pytest.Pytester) -> None:
    suite = """
    def test_signal(shared):
        shared.send_signal(signal.SIGKILL)
        shared.proc.wait(30)

    def test_stop(watchdog):
        stubborn = command("import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(600)")
        server = watchdog.launch(stubborn, name="stubborn", ready=harness.log_line("up"), grace_s=0.1)
        server.wait_ready().stop()
        polite = watchdog.launch(["sleep", "600"], name="polite")
        polite.stop()
        watchdog.launch(["true"], name="done").wait(30)
        assert False
    """.replace("\n    ", "\n")
    result, found = run(pytester, suite, "-W", "error")
    result.assert_outcomes(passed=1, failed=1)
    titles = [title for title in found if "shared" not in title]
    assert [re.sub(r"killed by |signal \d+ \(|\)", "", title) for title in titles] == [
        "harness: server 'stubborn': killed: SIGKILL",
        "harness: server 'polite': stopped: SIGTERM",
        "harness: server 'done': ended by itself: exit code 0",
    ]


def test_a_log_is_shown_once_also_where_the_teardown_fails_as_well(pytester: pytest.Pytester) -> None:
    suite = """
    @pytest.fixture
    def broken():
        yield
        assert False

    def test_both(broken, server_group):
        server = server_group.launch(TALKER + ["secret-free"], name="own", ready=harness.log_line("ready"))
        server.wait_ready(timeout_s=30)
        assert False
    """.replace("\n    ", "\n")
    result, _ = run(pytester, suite)
    result.assert_outcomes(failed=1, errors=1)
    text = result.stdout.str()
    assert text.count("> | ready") == 1
    assert text.count(".log (shown above)") == 1


def test_binary_long_and_torn_lines_are_shown_so_that_they_steer_nothing(pytester: pytest.Pytester) -> None:
    suite = r"""
    def test_it(server_group):
        code = ("import os; os.write(1, b'\\x1b[31mred\\x1b[0m\\n\\x00\\xff\\x07binary\\n' + b'x' * 100000 + b'\\n')"
                "; os.write(1, b'z' * (1 << 20)); os.write(1, b'\\nlast but one\\ntorn'); os.kill(os.getpid(), 9)")
        server_group.launch(command(code), name="own").wait(30)
        assert False
    """.replace("\n    ", "\n")
    result, found = run(pytester, suite)
    (text,) = found.values()
    assert text.endswith("> | last but one\n> | torn\n")
    assert "\x1b" not in result.stdout.str()
    assert max(map(len, text.splitlines())) < 2100


def test_a_watchdog_that_is_stopped_holds_up_a_report_once(pytester: pytest.Pytester) -> None:
    """Each of its servers would wait for an answer as long as a request may take."""
    suite = """
    from harness import link

    asked = []

    def test_it(server_group, monkeypatch):
        for number in range(3):
            server_group.launch(["sleep", "600"], name=f"own{number}")
        monkeypatch.setattr(link, "ANSWER_S", 1.0)
        request = link.Link.request
        monkeypatch.setattr(link.Link, "request", lambda *args, **more: asked.append(args) or request(*args, **more))
        os.kill(server_group.servers[0]._link.pid, signal.SIGSTOP)
        with open("pid", "w") as file:
            file.write(str(server_group.servers[0]._link.pid))
        assert False
    """.replace("\n    ", "\n")
    pytester.makeconftest(
        """
        import os, pathlib, signal, sys, pytest
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_makereport(item, call):
            report = yield
            if call.when == "call":
                os.kill(int(pathlib.Path("pid").read_text()), signal.SIGCONT)
                pathlib.Path("asked").write_text(str(len(sys.modules["test_it"].asked)))
            return report
        """
    )
    result, found = run(pytester, suite)
    result.assert_outcomes(failed=1)
    assert list(found) == [f"harness: server 'own{number}': its watchdog does not answer" for number in range(3)]
    assert (pytester.path / "asked").read_text(encoding="ascii") == "1"


# ---- the out-of-memory killer


def test_the_kernels_counters_are_read() -> None:
    assert oom.counters()["this machine"] >= 0


def test_what_cannot_be_read_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise FileNotFoundError(2, "No such file or directory", "/proc/self/cgroup")

    monkeypatch.setattr(oom, "_of_cgroup", fails)
    assert list(oom.counters()) == ["this machine"]


def test_more_kills_are_evidence_and_none_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"this cgroup": 3, "this machine": 9}
    monkeypatch.setattr(oom, "counters", lambda: now)
    assert oom.evidence(1, 0.0, now) == ""
    assert oom.evidence(1, 0.0, {"this cgroup": 1}) == (
        "the kernel's out-of-memory killer ended 2 processes of this cgroup while it ran"
    )


def test_the_logs_name_says_which_test_launched_the_server(pytester: pytest.Pytester, tmp_path: Path) -> None:
    suite = """
    @pytest.mark.parametrize("model", ["a/b c"])
    def test_it(model, server_group, shared):
        server_group.launch(["true"], name="web").wait(30)
        server_group.launch(["true"], name="\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 200).wait(30)
    """.replace("\n    ", "\n")
    result, _ = run(pytester, suite, f"--harness-log-dir={tmp_path / 'logs'}")
    result.assert_outcomes(passed=1)
    names = sorted(re.sub(r"-\d+-\d+\.log", "", path.name) for path in (tmp_path / "logs").iterdir())
    assert names.pop(-1) == "test_it.py_test_it_a_b_c--" + "\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 33
    assert names == ["shared--shared", "test_it.py_test_it_a_b_c--web"]
