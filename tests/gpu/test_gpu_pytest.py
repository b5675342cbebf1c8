"""GPUs in runs of pytest: the marker, workers that share devices, and who is charged with a leak."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from gpu.machine import Machine, Standin

pytest_plugins = ["pytester"]
_SUITE = """
import json, os, time
import pytest
import harness

def serve(group, *options, **named):
    command = {command!r} + list(options)
    return group.launch(command, ready=harness.http_ok("/health"), grace_s=5.0, **named).wait_ready(timeout_s=30)
"""


def make(pytester: pytest.Pytester, machine: Machine, *tests: str, ini: str = "") -> None:
    pytester.makeini(f"[pytest]\nharness_crash_grace_s = 0.5\n{ini}")
    source = _SUITE.format(command=machine.server("--mib", "3000"))
    pytester.makepyfile(test_it=source + "\n\n".join(tests))


def run(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    # pytest-benchmark, where it is installed, warns of pytest-xdist.
    plugins = ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    command = [sys.executable, "-m", "pytest", *plugins, "-W", "error", "-rsfE", *options]
    return pytester.run(*command, timeout=100)


def test_the_marker_gives_the_group_its_gpus(pytester: pytest.Pytester, machine: Machine) -> None:
    make(
        pytester,
        machine,
        """
@pytest.mark.gpus(1)
def test_one(server_group):
    (uuid,) = server_group.lease_gpus()
    assert serve(server_group).gpus == (uuid,)
""",
        f"""
@pytest.mark.gpus([{machine.uuids[-1]!r}])
def test_that_one(server_group):
    assert serve(server_group, gpus=1).gpus == ({machine.uuids[-1]!r},)
""",
        """
def test_none(server_group):
    assert serve(server_group).gpus == ()
""",
    )
    run(pytester).assert_outcomes(passed=3)


def test_a_machine_with_too_few_skips_and_says_so(pytester: pytest.Pytester, machine: Machine) -> None:
    make(pytester, machine, "@pytest.mark.gpus(99)\ndef test_many(server_group): ...")
    result = run(pytester)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*99 GPUs are wanted, but this process sees*"])


def test_a_machine_without_a_driver_skips_and_a_launch_fails(
    pytester: pytest.Pytester, standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LD_LIBRARY_PATH")
    make(
        pytester,
        standin,
        "@pytest.mark.gpus(1)\ndef test_marked(server_group): ...",
        "def test_launch(server_group):\n    serve(server_group, gpus=1)",
    )
    result = run(pytester)
    result.assert_outcomes(skipped=1, failed=1)
    result.stdout.fnmatch_lines(["*GpuUnavailable: *libnvidia-ml.so.1*"])


def test_a_driver_that_is_broken_is_an_error_and_no_skip(pytester: pytest.Pytester, standin: Standin) -> None:
    standin.fail("nvmlInitWithFlags", 9)
    make(pytester, standin, "@pytest.mark.gpus(1)\ndef test_marked(server_group): ...")
    run(pytester).assert_outcomes(errors=1)


@pytest.mark.parametrize("marker", ["gpus", "gpus()", "gpus(1, 2)", "gpus(n=1)", "gpus(0)", "gpus('0')"])
def test_a_wrong_marker_is_an_error(pytester: pytest.Pytester, standin: Standin, marker: str) -> None:
    make(pytester, standin, f"@pytest.mark.{marker}\ndef test_marked(server_group): ...")
    result = run(pytester)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*SpecError: *"])


@pytest.mark.parametrize("name", ["harness_gpu_wait_s", "harness_gpu_release_s"])
def test_a_setting_that_is_no_time_is_a_usage_error(pytester: pytest.Pytester, standin: Standin, name: str) -> None:
    make(pytester, standin, "def test_a(): ...", ini=f"{name} = soon")
    result = run(pytester)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{name} must be a number of seconds*"])


def test_a_wait_ends_as_the_setting_says_and_names_the_holder(pytester: pytest.Pytester, standin: Standin) -> None:
    make(
        pytester,
        standin,
        """
def test_two(server_group):
    serve(server_group, gpus=2, name="holder")
    serve(server_group, gpus=1)
""",
        ini="harness_gpu_wait_s = 1",
    )
    result = run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*GpuUnavailable: *it has waited 1 s: *is held by 'holder' of test_it.py::test_two*"])


def test_workers_never_have_a_device_at_once(pytester: pytest.Pytester, machine: Machine) -> None:
    make(
        pytester,
        machine,
        """
@pytest.mark.parametrize("number", range(12))
def test_alone(server_group, number, tmp_path_factory):
    server = serve(server_group, gpus=1)
    taken = tmp_path_factory.getbasetemp().parent / server.gpus[0]
    taken.mkdir()  # fails if another has it
    time.sleep(0.05)  # another worker has time to be wrong
    taken.rmdir()
""",
    )
    run(pytester, "-n", "4").assert_outcomes(passed=12)


def test_the_test_that_leaks_fails_and_the_next_one_passes(pytester: pytest.Pytester, standin: Standin) -> None:
    make(
        pytester,
        standin,
        """
def test_group_leaks(server_group):
    serve(server_group, "--linger-ms", "60000", "--listed", gpus=1, name="leaker")
""",
        """
def test_is_fine(server_group):
    serve(server_group, gpus=1)
""",
        """
def test_stop_leaks(watchdog):
    serve(watchdog, "--linger-ms", "60000", gpus=1, name="other").stop()
""",
        "def test_needs_none(server_group):\n    serve(server_group)",
        ini="harness_gpu_release_s = 3",
    )
    result = run(pytester, "-v")
    result.assert_outcomes(passed=4, errors=2)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_group_leaks*",
            "*GpuNotReleased: *",
            "*'leaker': GPU 0 (GPU-*): held after 3.* s, 3000 MiB now, 0 MiB before*",
            "*of the server: pid *, 3000 MiB: *gpu_server.py*",
            "*ERROR at teardown of test_stop_leaks*",
            "*'other': GPU 1 (GPU-*): held after*",
        ]
    )


def test_a_leak_that_the_test_has_seen_is_reported_once(pytester: pytest.Pytester, standin: Standin) -> None:
    make(
        pytester,
        standin,
        """
def test_sees_it(watchdog):
    with watchdog.group() as group:
        serve(group, "--linger-ms", "60000", gpus=1)
""",
        ini="harness_gpu_release_s = 0.5",
    )
    run(pytester).assert_outcomes(failed=1)


def test_a_leak_beside_another_failure_is_said_too(pytester: pytest.Pytester, standin: Standin) -> None:
    make(
        pytester,
        standin,
        """
@pytest.fixture
def breaks():
    yield
    raise RuntimeError("for a reason of its own")

def test_breaks(breaks, watchdog):
    serve(watchdog, "--linger-ms", "60000", gpus=1, name="hidden").stop()
""",
        """
def test_leaks_twice(watchdog):
    serve(watchdog, "--linger-ms", "60000", gpus=1, name="silent").stop()
    raise harness.GpuNotReleased("another")
""",
        ini="harness_gpu_release_s = 0.5",
    )
    result = run(pytester)
    result.assert_outcomes(passed=1, errors=1, failed=1)
    result.stdout.fnmatch_lines(
        ["*RuntimeError: for a reason of its own", "*what servers left behind*", "*'hidden': GPU*"]
    )
    result.stdout.fnmatch_lines(["*GpuNotReleased: another", "*what servers left behind*", "*'silent': GPU*"])


def test_a_session_server_gives_its_gpu_back_at_the_end(pytester: pytest.Pytester, machine: Machine) -> None:
    make(
        pytester,
        machine,
        """
@pytest.fixture(scope="session")
def model(watchdog):
    return serve(watchdog, gpus=1)

def test_one(model): ...
def test_two(model): ...
""",
    )
    run(pytester).assert_outcomes(passed=2)
    assert machine.book(machine.state_dir)["leases"] == []


def test_a_lease_is_its_groups_and_one_that_is_not_given_back_is_charged(
    pytester: pytest.Pytester, machine: Machine
) -> None:
    make(
        pytester,
        machine,
        """
@pytest.fixture(scope="module")
def shared(watchdog):
    with watchdog.group(gpus=1) as group:
        yield group
""",
        "def test_first(shared):\n    serve(shared)",
        "def test_second(shared): ...",
        "def test_leaves(watchdog):\n    watchdog.group('own', gpus=1).lease_gpus()",
    )
    result = run(pytester, "--harness-strict", "-p", "no:randomly", "-k", "first or second")
    result.assert_outcomes(passed=2, deselected=1)
    result = run(pytester, "--harness-strict", "-k", "leaves")
    result.assert_outcomes(passed=1, errors=1, deselected=2)
    result.stdout.fnmatch_lines(
        ["GPU-* were leased by this test for 'own' and not given back: leave or stop that group"]
    )
