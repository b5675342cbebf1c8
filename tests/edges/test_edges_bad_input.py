"""What is refused, with which error, and that nothing is left running by it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import processes
import pytest

import harness

if TYPE_CHECKING:
    from collections.abc import Callable

WRONG: list[tuple[object, dict[str, Any], str]] = [
    ([], {}, "the command is empty"),
    ((), {}, "the command is empty"),
    ("sleep 60", {}, "the command must be a list of strings, not str"),
    (b"sleep", {}, "the command must be a list of strings, not bytes"),
    (None, {}, "the command must be a list of strings, not NoneType"),
    ({"sleep": 1}, {}, "the command must be a list of strings, not dict"),
    ([""], {}, "the program is empty"),
    (["sleep", 60], {}, "argument 1 of the command must be a string, not int"),
    (["sleep", b"60"], {}, "argument 1 of the command must be a string, not bytes"),
    ([Path("/bin/sleep"), None], {}, "argument 1 of the command must be a string, not NoneType"),
    (["sl\0eep"], {}, "the program holds a NUL byte"),
    (["sleep", "6\x000"], {}, "argument 1 of the command holds a NUL byte"),
    (["sleep", "{port:peer}"], {}, r"\{port:peer\} is not among ports=\[\]"),
    (["sleep", "{port:}"], {"ports": ["peer"]}, r"\{port:\} is not among ports=\['peer'\]"),
    (["sleep"], {"env": {"A": "{port:x}"}, "ports": ["peer"]}, r"\{port:x\} is not among"),
    (["sleep"], {"env": ["A=1"]}, "env must be a mapping, not list"),
    (["sleep"], {"env": {"A": 1}}, "the value of 'A' in env must be a string, not int"),
    (["sleep"], {"env": {"A": "\0"}}, "the value of 'A' in env holds a NUL byte"),
    (["sleep"], {"env": {"A\0": "1"}}, "a name in env holds a NUL byte"),
    (["sleep"], {"env": {"A=B": "1"}}, "a name in env holds '='"),
    (["sleep"], {"env": {"": "1"}}, "a name in env is empty"),
    (["sleep"], {"env": {1: "1"}}, "a name in env must be a string, not int"),
    (["sleep"], {"cwd": "/no/such/directory"}, "cwd '/no/such/directory' does not exist"),
    (["sleep"], {"cwd": "/etc/passwd"}, "cwd '/etc/passwd' does not exist or is not a directory"),
    (["sleep"], {"cwd": ""}, "cwd is empty"),
    (["sleep"], {"cwd": "/\0"}, "cwd holds a NUL byte"),
    (["sleep"], {"name": ""}, "a name is empty"),
    (["sleep"], {"name": 5}, "a name must be a string, not int"),
    (["sleep"], {"ready": "/health"}, r"ready must be a callable, such as harness.http_ok\(\), not str"),
    (["sleep"], {"ready_timeout_s": 0}, "ready_timeout_s must be more than 0 seconds.*, not 0"),
    (["sleep"], {"ready_timeout_s": "5"}, "ready_timeout_s must be a number of seconds, not str"),
    (["sleep"], {"grace_s": 0.0}, "grace_s must be more than 0 seconds"),
    (["sleep"], {"grace_s": -1}, "grace_s must be more than 0 seconds.*, not -1"),
    (["sleep"], {"grace_s": float("nan")}, "grace_s must be more than 0 seconds.*, not nan"),
    (["sleep"], {"grace_s": float("inf")}, "grace_s must be more than 0 seconds.*, not inf"),
    (["sleep"], {"grace_s": None}, "grace_s must be a number of seconds, not NoneType"),
    (["sleep"], {"grace_s": True}, "grace_s must be a number of seconds, not bool"),
    (["sleep"], {"ask": "nobody"}, 'ask must be "root" or "group", not \'nobody\''),
    (["sleep"], {"ports": "peer"}, "ports must be a list of names"),
    (["sleep"], {"ports": 2}, "ports must be a list of names"),
    (["sleep"], {"ports": ["a", "a"]}, "a port's name is there twice"),
    (["sleep"], {"ports": ["a{b}"]}, "must not hold braces or colons"),
    (["sleep"], {"ports": [""]}, "a port's name is empty"),
    (["sleep"], {"gpus": 0}, "gpus must be at least 1"),
    (["sleep"], {"gpus": True}, "gpus must be a number or a list"),
    (["sleep"], {"gpus": 1.0}, "gpus must be a number or a list"),
    (["sleep"], {"gpus": "GPU-1"}, "gpus must be a number or a list"),
    (["sleep"], {"gpus": []}, "gpus is an empty list"),
    (["sleep"], {"gpus": [-1]}, "a device is an index or a UUID"),
    (["sleep"], {"gpus": ["0"]}, "a device is an index or a UUID"),
    (["sleep"], {"gpus": [0, 0]}, "a device is there twice"),
    (["sleep"], {"gpu_memory_mib": 0}, "gpu_memory_mib must be a whole number"),
    (["sleep"], {"gpu_memory_mib": 1.5}, "gpu_memory_mib must be a whole number"),
    (["sleep"], {"gpu_memory_mib": True}, "gpu_memory_mib must be a whole number"),
    (["sleep"], {"gpus": 1, "env": {"CUDA_VISIBLE_DEVICES": "0"}}, "env must not set CUDA_VISIBLE_DEVICES"),
    (["sleep"], {"deadline_s": 0}, "deadline_s must be more than 0 seconds"),
]


@pytest.mark.parametrize(("command", "options", "reason"), WRONG)
def test_a_wrong_launch_starts_nothing(
    watchdog: harness.Watchdog, command: object, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(harness.SpecError, match=reason):
        watchdog.launch(command, **options)  # type: ignore[arg-type]  # wrong on purpose
    with watchdog.group() as group, pytest.raises(harness.SpecError, match=reason):
        group.launch(command, **options)  # type: ignore[arg-type]
    assert watchdog.servers == ()
    assert processes.tree(watchdog.pid or 0) == []


def test_programs_that_cannot_be_executed(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    plain, garbage, orphan = (tmp_path / name for name in ("plain", "garbage", "orphan"))
    plain.write_text("#!/bin/sh\n", encoding="ascii")
    garbage.write_bytes(b"\x7fELF and no more")
    orphan.write_text("#!/no/such/interpreter\n", encoding="ascii")
    for path in (garbage, orphan):
        path.chmod(0o755)
    for program, reason in (
        ("no-such-program", "No such file or directory"),
        ("/no/such/program", "No such file or directory"),
        (plain, "Permission denied"),
        (tmp_path, "Permission denied"),
        (garbage, "Exec format error"),
        (orphan, "No such file or directory"),
    ):
        with pytest.raises(harness.LaunchFailed, match=rf"'rank0': cannot execute '.*': {reason}"):
            watchdog.launch([program], name="rank0")
    with pytest.raises(harness.LaunchFailed, match="cannot execute 'sleep': Argument list too long"):
        watchdog.launch(["sleep", "x" * 2**17])
    assert watchdog.servers == ()
    people = processes.identities(processes.tree(watchdog.pid or 0))
    assert not processes.left_after(people, 2.0)  # keepers that are on their way out
    logs = [path.name for path in (tmp_path / "state").rglob("*rank0*")]
    assert logs == []


def test_a_command_that_no_message_can_hold(watchdog: harness.Watchdog) -> None:
    with pytest.raises(harness.SpecError, match="the command and the environment are too large"):
        watchdog.launch(["sleep", "x" * (9 << 20)])
    assert watchdog.is_alive


def test_a_directory_that_is_gone(watchdog: harness.Watchdog, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(harness.SpecError, match="working directory of this process does not exist any more"):
        watchdog.launch(["sleep", "60"])
    assert watchdog.launch(["sleep", "60"], cwd=tmp_path).is_alive


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory that cannot be written to by nobody")
def test_a_log_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with harness.Watchdog(state_dir=tmp_path / "state", log_dir=tmp_path / "file" / "logs") as watchdog:
        with pytest.raises(harness.SpecError, match=r"cannot make the log directory .*: Not a directory"):
            watchdog.launch(["sleep", "60"])
        assert processes.tree(watchdog.pid or 0) == []


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: harness.http_ok("health"), "the path must begin with '/'"),
        (lambda: harness.http_ok("/a b"), "the path must begin with '/' and hold no spaces"),
        (lambda: harness.http_ok("/a\r\nX: y"), "the path must begin with '/'"),
        (lambda: harness.http_ok(""), "the path is empty"),
        (lambda: harness.http_ok(status=99), "an HTTP status is a number from 100 to 599, not 99"),
        (lambda: harness.http_ok(status=True), "an HTTP status is a number"),
        (lambda: harness.http_ok(port=0), "a port is a number from 1 to 65535, not 0"),
        (lambda: harness.port_open(port=65536), "a port is a number from 1 to 65535, not 65536"),
        (lambda: harness.port_open(port="80"), "a port is a number from 1 to 65535, not '80'"),  # type: ignore[arg-type]
        (lambda: harness.log_line("("), r"'\(' is not a regular expression"),
        (lambda: harness.log_line(""), "the pattern is empty"),
        (lambda: harness.log_line(b"up"), "the pattern must be a string, not bytes"),  # type: ignore[arg-type]
        (lambda: harness.Watchdog(state_dir=""), "state_dir is empty"),
        (lambda: harness.Watchdog(log_dir=3), "log_dir must be a string, not int"),  # type: ignore[arg-type]
        (lambda: harness.Watchdog(crash_grace_s=0), "crash_grace_s must be more than 0 seconds"),
        (lambda: harness.Watchdog(gpu_wait_s=0), "gpu_wait_s must be more than 0 seconds"),
        (lambda: harness.Watchdog(gpu_release_s=-1), "gpu_release_s must be more than 0 seconds"),
    ],
)
def test_wrong_options(call: Callable[[], object], reason: str) -> None:
    with pytest.raises(harness.SpecError, match=reason):
        call()


def test_wrong_times(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(["sleep", "60"])
    calls: list[Callable[..., object]] = [server.wait_ready, server.wait, watchdog.group().wait_ready]
    for call in calls:
        for wrong in (0, -1.0, float("nan"), "5", True):
            with pytest.raises(harness.SpecError, match="timeout_s must be"):
                call(wrong)
    for wrong in (0, -1.0, "5"):
        with pytest.raises(harness.SpecError, match="grace_s must be"):
            server.stop(grace_s=wrong)  # type: ignore[arg-type]
    with pytest.raises(harness.SpecError, match="gpus must be at least 1"):
        watchdog.group(gpus=0)
    with pytest.raises(harness.SpecError, match="was made without gpus="):
        watchdog.group().lease_gpus()
    assert server.state == "running"


def test_another_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = processes.tree(os.getpid())
    owner = harness.Watchdog(state_dir=tmp_path / "state")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(harness.PlatformNotSupported, match=r"the watchdog needs Linux .*; this is darwin"):
        owner.start()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delattr(os, "pidfd_open")
    with pytest.raises(harness.PlatformNotSupported, match="pidfd_open"):
        owner.start()
    assert (owner.pid, owner.is_alive, owner.servers) == (None, False, ())
    assert processes.tree(os.getpid()) == before


def test_a_watchdog_that_was_not_started(tmp_path: Path) -> None:
    owner = harness.Watchdog(state_dir=tmp_path / "state")
    for call in (lambda: owner.launch(["sleep", "60"]), lambda: owner.stop([]), lambda: owner.adopt(1)):
        with pytest.raises(harness.HarnessError, match="has not been started"):
            call()
    assert owner.close().outcomes == ()
    assert not (tmp_path / "state").exists()
