"""Every example of the page SHAPES.md, run as its reader runs it: the page is the only source of the code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import processes
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(__file__).parents[2] / "harness" / "SHAPES.md"
_MARKER = "HARNESS_SHAPES_TEST"
_EXAMPLE = re.compile(r"^```(?:python|ini)\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Servers are stopped with this grace when a script is killed, and may take as long to be gone.
CRASH_GRACE_S = 5.0
XDIST = ("-n", "2")


class Shape(NamedTuple):
    """How many tests a section has, how many servers they launch in one process, and which files are scripts."""

    tests: int = 0
    servers: int = 0
    scripts: tuple[str, ...] = ()


SHAPES = {
    "A server for each test": Shape(1, 1),
    "One server for the session": Shape(2, 1),
    "Servers for one module": Shape(2, 2),
    "A server shared by parametrised tests": Shape(6, 2),
    "Async tests with pytest-asyncio": Shape(3, 5),
    "Async tests with anyio, on asyncio and trio": Shape(4, 4),
    "unittest.TestCase": Shape(3, 1),  # that of the class with a watchdog of its own has its log elsewhere
    "Servers started in threads": Shape(3, 3),
    "A script without pytest": Shape(scripts=("serve.py", "serve_async.py")),
}
RUN_BY_PYTEST = [title for title, shape in SHAPES.items() if not shape.scripts]


def sections() -> dict[str, str]:
    _, *rest = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {title.strip(): text for title, text in (section.split("\n", 1) for section in rest)}


def examples(title: str) -> dict[str, str]:
    """Give the files of a section, by their names."""
    return dict(_EXAMPLE.findall(sections()[title]))


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Find every process that inherited this test's environment; keepers may be on their way out."""
    marker = f"{_MARKER}={uuid.uuid4().hex}"
    monkeypatch.setenv(*marker.split("="))
    yield
    left = processes.marked(marker)
    keepers = [pid for pid in left if processes.name(pid) == "harness-keeper"]
    processes.wait_gone(keepers, 2.0)
    assert not (set(left) - set(keepers)), processes.describe(set(left) - set(keepers))


def write(pytester: pytest.Pytester, title: str, **changes: str) -> None:
    """Write the files of a section; each change is of a text that is in one of them."""
    files = examples(title)
    for old, new in changes.items():
        assert any(old in code for code in files.values())
        files = {name: code.replace(old, new) for name, code in files.items()}
    for name, code in files.items():
        (pytester.path / name).write_text(code, encoding="utf-8")


@pytest.fixture(autouse=True)
def only_what_a_section_needs(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what makes the runs of all other tests do without pytest-asyncio: `run` chooses the plugins."""
    del pytester  # it comes first, since it sets the variable
    monkeypatch.delenv("PYTEST_ADDOPTS")


def run(pytester: pytest.Pytester, title: str, *options: str) -> pytest.RunResult:
    """Run pytest with no more plugins than the section needs, and with warnings as errors."""
    plugins = {"asyncio": "pytest-asyncio", "anyio": "anyio"}
    unused = [part for name, word in plugins.items() if word not in title for part in ("-p", f"no:{name}")]
    unused += ["-p", "no:randomly", "-p", "no:rerunfailures"]
    logs = f"--harness-log-dir={pytester.path / 'logs'}"
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "error", logs, *unused, *options, timeout=100)


def servers(pytester: pytest.Pytester) -> int:
    return len(list((pytester.path / "logs").glob("*.log")))


# ---- the page


def test_every_example_of_the_page_is_run() -> None:
    assert list(sections()) == list(SHAPES)
    for title, text in sections().items():
        files = examples(title)
        assert text.count("```") == 2 * len(files), f"in {title!r} a block is no example, or a name is there twice"
        by_pytest = [name for name in files if re.fullmatch(r"conftest\.py|pytest\.ini|test_\w+\.py", name)]
        assert sorted([*by_pytest, *SHAPES[title].scripts]) == sorted(files)
        tests = sum(len(re.findall(r"^ *(?:async )?def test_", code, re.MULTILINE)) for code in files.values())
        assert tests <= SHAPES[title].tests or SHAPES[title].scripts


# ---- run by pytest


@pytest.mark.parametrize("title", RUN_BY_PYTEST)
def test_by_pytest(pytester: pytest.Pytester, title: str) -> None:
    write(pytester, title)
    run(pytester, title).assert_outcomes(passed=SHAPES[title].tests)
    assert servers(pytester) == SHAPES[title].servers


@pytest.mark.parametrize("title", RUN_BY_PYTEST)
def test_by_pytest_xdist(pytester: pytest.Pytester, title: str) -> None:
    write(pytester, title)
    run(pytester, title, *XDIST).assert_outcomes(passed=SHAPES[title].tests)
    # A server that is shared is launched in one worker or in both.
    assert SHAPES[title].servers <= servers(pytester) <= 2 * SHAPES[title].servers


def test_a_variant_is_launched_once_where_a_module_stays_in_one_worker(pytester: pytest.Pytester) -> None:
    title = "A server shared by parametrised tests"
    write(pytester, title)
    run(pytester, title, *XDIST, "--dist", "loadscope").assert_outcomes(passed=SHAPES[title].tests)
    assert servers(pytester) == SHAPES[title].servers


@pytest.mark.parametrize("title", [title for title in RUN_BY_PYTEST if "pytest-asyncio" not in title])
def test_both_async_plugins_may_be_installed(pytester: pytest.Pytester, title: str) -> None:
    write(pytester, title)
    setting = ("-o", "asyncio_default_fixture_loop_scope=function")
    result = run(pytester, f"{title}, pytest-asyncio, anyio", *setting)
    result.assert_outcomes(passed=SHAPES[title].tests)


def test_by_unittest(pytester: pytest.Pytester) -> None:
    write(pytester, "unittest.TestCase")
    for command in (["-m", "unittest", "-v", "test_without_pytest"], ["test_without_pytest.py"]):
        done = pytester.run(sys.executable, "-W", "error", *command, timeout=60)
        assert done.ret == 0
        done.stderr.fnmatch_lines(["Ran 1 test in *", "OK"])


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('"{port}"', '"{port}" if role != "decode" else "none"', "*ServerExited: 'decode' * ended with exit code 2 *"),
        ("sys.executable,", 'sys.executable if role != "decode" else "/no/such",', "*LaunchFailed: *'/no/such'*"),
        ("# the preparation", "; assert role != 'decode'", "*AssertionError*"),
    ],
    ids=["server", "launch", "preparation"],
)
def test_one_of_the_threads_fails(pytester: pytest.Pytester, old: str, new: str, error: str) -> None:
    title = "Servers started in threads"
    write(pytester, title, **{old: new})
    result = run(pytester, title)
    result.assert_outcomes(errors=3)
    result.stdout.fnmatch_lines([error])


@pytest.mark.parametrize("title", ["Servers for one module", "unittest.TestCase"])
def test_a_server_that_does_not_start_is_the_tests_error(pytester: pytest.Pytester, title: str) -> None:
    write(pytester, title, **{'"{port}"': '"none"'})
    result = run(pytester, title)
    outcomes = result.parseoutcomes()
    assert outcomes.get("passed", 0) == 0
    assert outcomes.get("errors", 0) + outcomes.get("failed", 0) == SHAPES[title].tests
    result.stdout.fnmatch_lines(["*ServerExited: * ended with exit code 2 *"])


# ---- scripts


class Script:
    """A script of the page, whose two servers answer."""

    def __init__(self, directory: Path, name: str) -> None:
        command = [sys.executable, "-W", "error", name]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=directory, stdout=pipe, stderr=pipe, text=True)
        assert self.process.stdout is not None
        self.ups = [self.process.stdout.readline().split() for _ in range(2)]
        assert [up[0] for up in self.ups] == ["prefill", "decode"], self.process.communicate()
        self.tree = processes.identities(processes.tree(self.process.pid))

    def end(self) -> str:
        """Wait until it has ended; give its standard error."""
        return self.process.communicate(timeout=60)[1]

    def left(self) -> list[processes.Identity]:
        """Give what runs, but for keepers that are on their way out."""
        keepers = [who for who in self.tree if processes.name(who.pid) == "harness-keeper"]
        return processes.left_after(keepers, 2.0) + [who for who in self.tree if processes.is_running(who)]


@pytest.fixture(params=SHAPES["A script without pytest"].scripts)
def script(request: pytest.FixtureRequest, pytester: pytest.Pytester) -> Iterator[Script]:
    write(pytester, "A script without pytest")
    started = Script(pytester.path, request.param)
    with started.process:
        yield started
        started.process.kill()


def test_ctrl_c_stops_the_servers_of_a_script(script: Script) -> None:
    script.process.send_signal(signal.SIGINT)
    assert script.end().endswith("KeyboardInterrupt\n")
    assert script.process.returncode == -signal.SIGINT
    assert script.left() == []


def test_the_end_of_a_server_ends_the_script(script: Script) -> None:
    os.kill(int(script.ups[0][1]), signal.SIGTERM)
    assert script.end() == ""
    assert script.process.returncode == 0
    assert script.left() == []


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_a_script_that_is_killed_leaves_no_server(script: Script, ending: signal.Signals) -> None:
    script.process.send_signal(ending)
    script.end()
    assert script.process.returncode == -ending
    assert processes.left_after(script.tree, 2 * CRASH_GRACE_S) == []
