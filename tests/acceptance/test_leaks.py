"""What a test or a fixture leaves behind is charged to it: a warning, or an error with --harness-strict.

The sleeps are servers: long ones do nothing but be there, a short one is how long a server takes to exit.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

HEAD = """
import os, signal, socket, subprocess, sys
import pytest, harness

def command(code):
    return [sys.executable, "-u", "-c", code]

"""
STRICT = "--harness-strict"


def run(pytester: pytest.Pytester, suite: str, *options: str) -> pytest.RunResult:
    pytester.makepyfile(test_it=HEAD + suite.replace("\n    ", "\n"))
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", *options, timeout=100)


def charged(result: pytest.RunResult, pattern: str) -> list[str]:
    """Give the tests that are charged with what matches, by the summary at the run's end."""
    found = [re.search(rf"LEAK: {pattern}.* \[in (\S+?)(?:, on gw\d+)?\]$", line) for line in result.outlines]
    return [match[1].partition("::")[2] for match in found if match is not None]


LEAVES = """
    def test_leaves(watchdog):
        watchdog.launch(["sleep", "600"], name="own")

    def test_next(watchdog):
        own, = watchdog.servers
        print("SEEN", own.state)
    """


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["plain", "xdist"])
def test_a_server_that_a_test_leaves_running_is_a_warning(pytester: pytest.Pytester, options: Sequence[str]) -> None:
    result = run(pytester, LEAVES, "-rP", *options)
    result.assert_outcomes(passed=2, warnings=1)
    result.stdout.fnmatch_lines(
        ["test_it.py::test_leaves", "*LeakWarning: server 'own' (pid *, port *) was launched by this test and left*"]
    )
    result.stdout.fnmatch_lines(["SEEN running"])  # a warning changes nothing
    assert charged(result, "server 'own'") == ["test_leaves"]


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["plain", "xdist"])
def test_it_is_an_error_at_teardown_and_is_ended_if_that_is_wanted(
    pytester: pytest.Pytester, options: Sequence[str]
) -> None:
    result = run(pytester, LEAVES, STRICT, "-rPE", *options)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["_* ERROR at teardown of test_leaves _*", "*server 'own' (pid *"])
    result.stdout.fnmatch_lines(["SEEN gone"])
    result.stdout.fnmatch_lines(["ERROR test_it.py::test_leaves - harness.errors.Leaked: server 'own'*"])
    result.stdout.no_fnmatch_line("*_multicall*")  # no traceback of what raised it
    assert charged(result, "server 'own'") == ["test_leaves"]


def test_the_setting_and_warnings_as_errors_do_that_too(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nharness_strict = true")
    run(pytester, LEAVES).assert_outcomes(passed=2, errors=1)
    pytester.makeini("[pytest]\nharness_strict = false")
    result = run(pytester, LEAVES, "-W", "error")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["ERROR test_it.py::test_leaves - harness.run_report.LeakWarning: server 'own'*"])


def test_what_is_stopped_by_the_end_of_the_teardown_is_no_leak(pytester: pytest.Pytester) -> None:
    suite = """
    @pytest.fixture
    def own(watchdog):
        with watchdog.launch(["sleep", "600"], name="own") as server:
            yield server

    @pytest.fixture(scope="module")
    def of_module(watchdog):
        server = watchdog.launch(["sleep", "600"], name="of-module")
        yield server
        server.stop()

    @pytest.fixture(scope="session")
    def shared(watchdog):
        return watchdog.launch(["sleep", "600"], name="shared")

    @pytest.fixture(scope="module")
    def factory(watchdog):
        with watchdog.group() as group:
            yield group.launch

    @pytest.fixture(scope="module")
    def makes(watchdog):
        made = []

        def make():
            made.append(watchdog.launch(["sleep", "600"]))

        yield make
        watchdog.stop(made)

    @pytest.fixture(scope="session")
    def cached(watchdog):
        servers = {}
        return lambda name: servers.get(name) or servers.setdefault(name, watchdog.launch(["sleep", "600"]))

    def test_all(own, of_module, shared, factory, server_group, watchdog, makes, cached):
        makes()
        cached("a")
        server_group.launch(["sleep", "600"])
        factory(["sleep", "600"])
        watchdog.launch(["true"], name="exits").wait(30)
        watchdog.launch(["sleep", "600"]).proc.terminate()  # it is on its way out
        with harness.Watchdog() as other:
            other.launch(["sleep", "600"])

    def test_more(of_module, factory, makes, cached):
        makes()
        cached("a")
        factory(["sleep", "600"])
    """
    result = run(pytester, suite, STRICT, "-W", "error")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["harness: 12 servers launched: 10 ended when asked, 2 ended by itself; *"])


def test_a_watchdog_that_a_test_starts_and_leaves(pytester: pytest.Pytester) -> None:
    suite = """
    def test_leaves():
        harness.Watchdog().start().launch(["sleep", "600"], name="own")

    @pytest.fixture(scope="module")
    def of_module():
        return harness.Watchdog().start()

    def test_uses(of_module):
        of_module.launch(["sleep", "600"], name="of-module")

    def test_last(of_module):
        pass
    """
    result = run(pytester, suite, STRICT)
    result.assert_outcomes(passed=3, errors=2)
    assert charged(result, "server 'own'") == ["test_leaves"]
    # What is launched on it is its own, whoever launches.
    assert charged(result, "server 'of-module'") == ["test_last"]


@pytest.mark.parametrize("scope", ["class", "module", "package"])
def test_a_fixture_of_a_wider_scope_is_charged_where_it_is_torn_down(pytester: pytest.Pytester, scope: str) -> None:
    suite = f"""
    @pytest.fixture(scope="{scope}")
    def model(watchdog):
        return watchdog.launch(["sleep", "600"], name="model")

    class TestIt:
        def test_first(self, model):
            pass

        def test_last(self, model):
            pass
    """
    pytester.makepyfile(test_other="def test_other(): pass")
    result = run(pytester, suite, STRICT, "test_it.py", "test_other.py")
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines([f"server 'model' (pid *) was launched by fixture 'model' (scope {scope}) and left*"])
    ends = {"class": "TestIt::test_last", "module": "TestIt::test_last", "package": "test_other"}
    assert charged(result, "server 'model'") == [ends[scope]]


@pytest.mark.parametrize("scope", ["module", "session"])
def test_a_parametrised_fixture_is_torn_down_in_the_test_that_used_it_last(
    pytester: pytest.Pytester, scope: str
) -> None:
    """It would else be done it in the setup of the next test, which would fail for what the last one left."""
    suite = f"""
    order = []

    @pytest.fixture(scope="{scope}", params=[0, 1])
    def model(watchdog, request):
        yield watchdog.launch(["sleep", "600"], name=f"model{{request.param}}")
        order.append(f"down {{request.param}}")

    @pytest.fixture(scope="{scope}")
    def client(model):
        yield model
        order.append("client down")

    def test_first(model, client):
        order.append("first")

    def test_second(model, client):
        order.append("second")

    def test_order():
        print("ORDER", ", ".join(order))
    """
    result = run(pytester, suite, STRICT, "-rP", "--setup-show")
    result.stdout.fnmatch_lines(["ORDER first, second, client down, down 0, first, second*"])
    assert charged(result, "server 'model0'") == ["test_second[0]"]
    # The last one of a session ends with it, as the README has it.
    assert charged(result, "server 'model1'") == (["test_order"] if scope == "module" else [])
    result.assert_outcomes(passed=5, errors=2 if scope == "module" else 1)


def test_what_depends_on_a_parameter_is_torn_down_with_it(pytester: pytest.Pytester) -> None:
    suite = """
    @pytest.fixture(scope="module", params=["a", "b"])
    def conf(request):
        return request.param

    @pytest.fixture(scope="module")
    def derived(watchdog, conf):
        return watchdog.launch(["sleep", "600"], name=f"derived-{conf}")

    def test_one(derived):
        pass

    def test_two(derived):
        pass
    """
    result = run(pytester, suite, STRICT)
    result.assert_outcomes(passed=4, errors=2)
    assert charged(result, "server 'derived-a'") == ["test_two[a]"]
    assert charged(result, "server 'derived-b'") == ["test_two[b]"]


def test_a_parameter_is_another_one_by_its_value(pytester: pytest.Pytester) -> None:
    suite = """
    made = []

    @pytest.fixture(scope="module")
    def model(watchdog, request):
        made.append(request.param)
        return watchdog.launch(["sleep", "600"], name=f"model-{request.param}")

    @pytest.mark.parametrize("model", ["x"], indirect=True)
    def test_one(model):
        pass

    @pytest.mark.parametrize("model", ["x"], indirect=True)
    def test_two(model):
        pass

    @pytest.mark.parametrize("model", ["y"], indirect=True)
    def test_three(model):
        assert made == ["x", "y"]
    """
    result = run(pytester, suite, STRICT)
    result.assert_outcomes(passed=3, errors=2)
    assert charged(result, "server 'model-x'") == ["test_two[x]"]
    assert charged(result, "server 'model-y'") == ["test_three[y]"]


def test_a_server_that_the_test_has_killed_itself_is_no_leak(pytester: pytest.Pytester) -> None:
    suite = """
    @pytest.mark.parametrize("number", range(8))
    def test_kills(watchdog, number):
        os.kill(watchdog.launch(["sleep", "600"], name=f"k{number}").pid, signal.SIGKILL)
    """
    result = run(pytester, suite, STRICT)
    result.assert_outcomes(passed=8)
    result.stdout.fnmatch_lines(["DIED: server 'k0': killed by SIGKILL [[]in test_it.py::test_kills[[]0]]"])


def test_its_teardown_fails_the_test_that_used_it_last(pytester: pytest.Pytester) -> None:
    suite = """
    @pytest.fixture(scope="module", params=[0, 1])
    def model(watchdog, request):
        with watchdog.launch(["sleep", "600"], name="model"):
            yield
        assert request.param, "the first does not go down well"

    def test_it(model):
        pass
    """
    result = run(pytester, suite)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["ERROR test_it.py::test_it[[]0] - AssertionError: the first does not*"])


def test_a_fixture_that_is_torn_down_in_a_setup_says_whose_it_was(pytester: pytest.Pytester) -> None:
    """The test between the two does not use it: that its parameter changes is known in the setup of the last."""
    suite = """
    @pytest.fixture(scope="session")
    def model(watchdog, request):
        return watchdog.launch(["sleep", "600"], name=f"model{request.param}")

    @pytest.mark.parametrize("model", [0], indirect=True)
    def test_a(model):
        pass

    def test_between():
        pass

    @pytest.mark.parametrize("model", [1], indirect=True)
    def test_b(model):
        pass
    """
    pytester.makeconftest(
        "def pytest_collection_modifyitems(items): items.sort(key=lambda item: 'abetweenb'.index(item.name[5:6] == 'b'"
        " and item.name[5:12] or item.name[5:6]) if not item.name.startswith('test_b[') else 99)"
    )
    result = run(pytester, suite)
    result.assert_outcomes(passed=3, warnings=1)
    result.stdout.fnmatch_lines(["*server 'model0' (pid *) was launched by fixture 'model' (scope session) and left*"])


def test_a_factory_that_stops_nothing_is_charged_and_not_who_calls_it(pytester: pytest.Pytester) -> None:
    suite = """
    @pytest.fixture(scope="module")
    def makes(watchdog):
        return lambda: watchdog.launch(["sleep", "600"], name="made")

    def test_calls(makes):
        makes()

    def test_last(makes):
        pass
    """
    result = run(pytester, suite, STRICT)
    result.assert_outcomes(passed=2, errors=1)
    assert charged(result, r"server 'made' .* by fixture 'makes' \(scope module\)") == ["test_last"]


def test_what_a_fixture_has_launched_that_fails_is_ended_at_once(pytester: pytest.Pytester) -> None:
    suite = """
    @pytest.fixture(scope="module")
    def model(watchdog):
        watchdog.launch(["sleep", "600"], name="model")
        raise RuntimeError("no model")

    def test_it(model):
        pass

    def test_next(watchdog):
        (server,) = watchdog.servers
        assert (server.outcome.how, server.pids()) == ("asked", [])
    """
    result = run(pytester, suite, STRICT)
    assert charged(result, "server 'model'") == []
    result.assert_outcomes(errors=1, passed=1)


def test_what_a_test_has_left_whose_server_did_not_start_is_ended_and_nothing_else(pytester: pytest.Pytester) -> None:
    suite = """
    @pytest.fixture(scope="module")
    def shared(watchdog):
        return watchdog.launch(["sleep", "600"], name="shared")

    @pytest.fixture(scope="module")
    def make(watchdog):
        with watchdog.group("made") as group:
            yield lambda: group.launch(["sleep", "600"])

    @pytest.mark.parametrize("how", ["passes", "fails", "fails to start"])
    def test_leaves(shared, make, watchdog, how):
        make()
        watchdog.launch(["sleep", "600"], name=f"own: {how}")
        if how == "fails to start":
            watchdog.launch(["false"], name="no model", ready=harness.port_open()).wait_ready()
        assert how == "passes"

    def test_next(shared, watchdog):
        alive = [server.name for server in watchdog.servers if server.is_alive]
        assert alive == ["shared", "made-0", "own: passes", "made-1", "own: fails", "made-2"]
    """
    result = run(pytester, suite)
    result.assert_outcomes(failed=2, passed=2, warnings=4)
    result.stdout.fnmatch_lines(["*The test failed after a server of it did not get ready: what it left was stopped.*"])


def test_a_test_that_is_repeated_is_charged_each_time(pytester: pytest.Pytester) -> None:
    suite = """
    def test_leaves(watchdog):
        watchdog.launch(["sleep", "600"], name=f"own{len(watchdog.servers)}")
        assert len(watchdog.servers) > 1
    """
    result = run(pytester, suite, STRICT, "-p", "rerunfailures", "--reruns", "1")
    assert charged(result, "server 'own0'") == ["test_leaves"]
    assert charged(result, "server 'own1'") == ["test_leaves"]


def test_many_are_ended_together_and_all_are_named(pytester: pytest.Pytester) -> None:
    suite = """
    def test_leaves(watchdog):
        # Each takes a second to exit: one after another that would be four.
        slow = "import signal, time; signal.signal(15, lambda *_: (time.sleep(1), exit())); print('up'); time.sleep(60)"
        servers = [
            watchdog.launch(command(slow), name=f"own{number}", ready=harness.log_line("up")) for number in range(4)
        ]
        for server in servers:
            server.wait_ready()
    """
    result = run(pytester, suite, STRICT)
    result.assert_outcomes(passed=1, errors=1)
    assert len(charged(result, r"server 'own\d'")) == 4
    times = re.search(
        r"^parallel stops .* \((\S+) s one by one, (\S+) s in parallel\)$", result.stdout.str(), re.MULTILINE
    )
    assert times is not None
    assert float(times[1]) >= 4.0
    assert float(times[2]) < float(times[1]) / 2


def test_a_port_that_somebody_else_holds_is_charged(pytester: pytest.Pytester) -> None:
    suite = """
    def test_leaves(watchdog):
        # It gives its socket away, as a service manager or a container's proxy may. The name is in no file system.
        meeting = f"'\\\\0harness-test-{os.getpid()}'"
        gives = (
            "import socket, sys, time; other = socket.socket(socket.AF_UNIX); other.bind(" + meeting + ")"
            "; other.listen(); server = socket.socket(); server.setsockopt(1, 2, 1)"
            "; server.bind(('127.0.0.1', int(sys.argv[1]))); server.listen()"
            "; socket.send_fds(other.accept()[0], [b'x'], [server.fileno()]); time.sleep(600)"  # it stays
        )
        server = watchdog.launch([*command(gives), "{port}"], ready=harness.port_open(), name="gives")
        server.wait_ready(timeout_s=30)
        takes = (
            "import socket, sys; other = socket.socket(socket.AF_UNIX); other.connect(" + meeting + ")"
            "; kept = socket.recv_fds(other, 1, 1); print('has it', flush=True); sys.stdin.read()"
        )
        global holder
        holder = subprocess.Popen(command(takes), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert holder.stdout.readline() == b"has it\\n"
        server.stop()

    def test_next():
        holder.communicate()
    """
    result = run(pytester, suite)
    result.assert_outcomes(passed=2, warnings=1)
    result.stdout.fnmatch_lines(["*port * of server 'gives', which has ended, is still held by pid * (python*)*"])
    assert charged(result, "port") == ["test_leaves"]


def test_a_port_that_is_used_again_is_not(pytester: pytest.Pytester) -> None:
    suite = """
    def test_uses(watchdog):
        server = watchdog.launch(["sleep", "600"])
        server.stop()
        global own
        own = socket.create_server(("127.0.0.1", server.port))

    def test_next():
        own.close()
    """
    run(pytester, suite, STRICT, "-W", "error").assert_outcomes(passed=2)


def test_what_the_watchdog_ends_for_a_hung_test_is_not_charged(pytester: pytest.Pytester) -> None:
    suite = """
    @pytest.mark.harness_deadline(2)
    def test_hangs(watchdog):
        # It stays, asked or not.
        code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(600)"
        watchdog.launch(command(code), name="own", ready=harness.log_line("up")).wait_ready(timeout_s=60)
        while True:
            signal.sigtimedwait([], 1)  # interrupted at the deadline, while its server has its grace

    def test_next(watchdog):
        server, = watchdog.servers
        assert server.state in {"asked", "killed", "gone"}
    """
    result = run(pytester, suite, STRICT)
    result.assert_outcomes(passed=1, failed=1)
    assert charged(result, "server 'own'") == []


@pytest.mark.parametrize("how", ["raise KeyboardInterrupt", "pytest.exit('enough')"])
def test_a_run_that_is_cut_off_charges_nobody(pytester: pytest.Pytester, how: str) -> None:
    suite = f"""
    def test_it(server_group):
        server_group.launch(["sleep", "600"], name="own")
        {how}
    """
    result = run(pytester, suite, STRICT)
    result.stdout.fnmatch_lines(["harness: 1 server launched: 1 ended when asked; *"])
    result.stdout.no_fnmatch_line("*LEAK*")


def test_a_watchdog_that_does_not_answer_is_no_leak(pytester: pytest.Pytester) -> None:
    suite = """
    from harness import link

    def test_stops_it(watchdog, monkeypatch):
        watchdog.launch(["sleep", "600"], name="own")
        monkeypatch.setattr(link, "ANSWER_S", 0.5)
        os.kill(watchdog.pid, signal.SIGSTOP)

    def test_next(watchdog):
        os.kill(watchdog.pid, signal.SIGCONT)
    """
    result = run(pytester, suite)
    assert charged(result, "server 'own'") == []
