"""What `launch` does and what a `Server` says of itself, name by name of the public API."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import pickle
import shutil
import socket
import stat
import sys
from typing import TYPE_CHECKING

import processes
import pytest
from servers.commands import READY_S, STUBBORN, family, member, pid_of

import harness

if TYPE_CHECKING:
    from pathlib import Path

ERRORS = (
    harness.SpecError,
    harness.LaunchFailed,
    harness.ServerExited,
    harness.NotReady,
    harness.WatchdogDied,
    harness.GpuUnavailable,
    harness.GpuNotReleased,
    harness.Leaked,
    harness.PlatformNotSupported,
)


def ran(watchdog: harness.Watchdog, command: list[str], **options: object) -> list[str]:
    """Launch a program that ends by itself, and give the lines that it wrote."""
    server = watchdog.launch(command, **options)  # type: ignore[arg-type]  # any of launch's options
    assert server.wait(READY_S).returncode == 0
    return server.log_path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("owner", [harness.Watchdog, harness.ServerGroup])
def test_launch_has_the_contracts_options(owner: type[harness.Watchdog | harness.ServerGroup]) -> None:
    parameters = list(inspect.signature(owner.launch).parameters.values())[1:]
    assert parameters[0].name == "command"
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters[1:])
    assert {parameter.name: parameter.default for parameter in parameters[1:]} == {
        "name": None,
        "env": None,
        "cwd": None,
        "ready": None,
        "ready_timeout_s": None,
        "grace_s": 15.0,
        "ask": "root",
        "ports": (),
        "gpus": None,
        "gpu_memory_mib": None,
        "deadline_s": None,
    }


@pytest.mark.parametrize("error", ERRORS)
def test_errors_are_harness_errors_that_survive_pickling(error: type[harness.HarnessError]) -> None:
    made = error("what happened", server="dp0", returncode=-9, log_tail="one\ntwo")
    copy = pickle.loads(pickle.dumps(made))  # noqa: S301 - that it can be pickled is the point
    assert isinstance(copy, harness.HarnessError)
    assert type(copy) is error
    assert str(copy) == str(made)
    assert (copy.server, copy.returncode, copy.log_tail) == ("dp0", -9, "one\ntwo")
    assert issubclass(harness.SpecError, ValueError)
    assert issubclass(harness.NotReady, TimeoutError)


def test_every_public_name_can_be_loaded() -> None:
    assert [name for name in harness.__all__ if not hasattr(harness, name)] == []
    assert dir(harness) == harness.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = harness.nothing


def test_a_server_says_what_it_is(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    server = watchdog.launch(["sleep", "60"])
    assert server.name.startswith("sleep-")
    # The kernel gives a program its name a moment after it has closed what execve closes, which is the sign of success.
    processes.wait_for(lambda: processes.name(server.pid) == "sleep", READY_S, "its name")
    assert processes.parent(processes.parent(server.pid)) == watchdog.pid
    assert server.pid == server.pgid == processes.group(server.pid) == os.getsid(server.pid)
    assert server.host == "127.0.0.1"
    assert 1024 < server.port < 65536
    assert server.ports == {}
    assert [server.url(path) for path in ("", "/v1", "v1")] == [
        f"http://127.0.0.1:{server.port}{path}" for path in ("", "/v1", "/v1")
    ]
    assert tmp_path in server.log_path.parents
    assert stat.S_IMODE(server.log_path.stat().st_mode) == 0o600
    assert server.log_tail() == ""
    assert (server.state, server.returncode, server.is_alive) == ("running", None, True)
    assert server.pids() == [server.pid]
    assert server.wait_ready() is server
    assert server.outcome is None
    assert watchdog.servers == (server,)
    assert repr(server.name) in repr(server)
    assert str(watchdog.pid) in repr(watchdog)


def test_the_watchdog_is_a_process_of_its_own(watchdog: harness.Watchdog) -> None:
    assert watchdog.is_alive
    assert watchdog.start() is watchdog
    assert watchdog.pid is not None
    assert processes.parent(watchdog.pid) == os.getpid()
    pid = watchdog.pid
    processes.wait_for(lambda: processes.name(pid) == "harness-watchd", READY_S, "its name")
    assert os.getsid(pid) == pid


def test_tokens_are_replaced_and_every_other_brace_is_left_alone(watchdog: harness.Watchdog) -> None:
    untouched = ['{"a": {"b": [1, "{x}"]}}', "{}", "{ports}", "{PORT}", "{port", "{ port }", "a b\tc\n$HOME"]
    tokens = ["{port}", "{port:peer}", "{host}", "{name}", "{log_dir}", '{"port": {port}}', "{{port}}", "{port}{port}"]
    server = watchdog.launch(
        [sys.executable, "-I", "-S", "-c", "import sys, json; print(json.dumps(sys.argv[1:]))", *untouched, *tokens],
        name="rank {port} 0",
        ports=["peer"],
    )
    assert server.wait(READY_S).returncode == 0
    given = json.loads(server.log_tail())
    assert given[: len(untouched)] == untouched
    port, peer = server.port, server.ports["peer"]
    assert given[len(untouched) :] == [
        *(str(port), str(peer), "127.0.0.1", "rank {port} 0", str(server.log_path.parent)),
        *(f'{{"port": {port}}}', f"{{{port}}}", f"{port}{port}"),
    ]


def test_each_port_is_another_and_nobody_else_gets_one(watchdog: harness.Watchdog) -> None:
    servers = [watchdog.launch(["sleep", "60"], ports=["a", "b"]) for _ in range(4)]
    ports = [port for server in servers for port in (server.port, *server.ports.values())]
    assert len(set(ports)) == 12
    assert all(set(server.ports) == {"a", "b"} for server in servers)
    assert not any(map(can_be_bound, ports))
    watchdog.stop(servers)
    assert all(map(can_be_bound, ports))


def can_be_bound(port: int) -> bool:
    """Bind a port, on either loopback address, as a program does that shares it with nobody."""
    for kind, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with contextlib.suppress(OSError), socket.socket(kind) as probe:
            probe.bind((address, port))
            return True
    return False


def test_the_environment_is_the_test_processs_with_changes(
    watchdog: harness.Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEPT", "{port} stays: it is not from env=")
    monkeypatch.setenv("GONE", "removed by None")
    monkeypatch.setenv("OVER", "old")
    monkeypatch.delenv("HOME", raising=False)
    lines = ran(
        watchdog,
        ["env"],
        name="it",
        env={"GONE": None, "NEVER": None, "OVER": "n={name} {braces}", "NEW": "", "ODD": "a=b"},
    )
    assert {"KEPT={port} stays: it is not from env=", "OVER=n=it {braces}", "NEW=", "ODD=a=b"} <= set(lines)
    assert {line.split("=")[0] for line in lines} == {*os.environ, "NEW", "ODD", "HARNESS_SERVER"} - {"GONE"}


def test_a_changed_directory_reaches_the_next_launch(
    watchdog: harness.Watchdog, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert ran(watchdog, ["pwd"]) == [str(tmp_path / "here")]
    assert ran(watchdog, ["pwd"], cwd="below") == [str(tmp_path / "here" / "below")]
    assert ran(watchdog, ["pwd"], cwd=tmp_path) == [str(tmp_path)]


def test_a_program_is_found_on_the_servers_own_path(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    program = tmp_path / "only-here"
    program.write_text("#!/bin/sh\necho found\n", encoding="ascii")
    program.chmod(0o755)
    assert ran(watchdog, ["only-here"], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}) == ["found"]
    assert ran(watchdog, ["./only-here"], cwd=tmp_path) == ["found"]


def test_arguments_and_values_need_not_be_utf_8(watchdog: harness.Watchdog) -> None:
    odd = os.fsdecode(b"\xff\xfe ") + "ü"
    server = watchdog.launch(["sh", "-c", 'printf "%s|%s" "$1" "$ODD"', "sh", odd], env={"ODD": odd})
    server.wait(READY_S)
    assert server.log_path.read_bytes() == os.fsencode(f"{odd}|{odd}")


def test_a_server_starts_with_default_signals_and_three_descriptors(watchdog: harness.Watchdog) -> None:
    script = "grep -E 'Sig(Blk|Ign)' /proc/self/status; ls /proc/self/fd; readlink /proc/self/fd/0"
    lines = ran(watchdog, ["sh", "-c", script])
    assert [processes.signal_set(line.split()[1]) for line in lines[:2]] == [0, 0]
    assert lines[2:] == ["0", "1", "2", "3", "/dev/null"]  # 3 is the directory that ls reads


def test_the_log_holds_both_outputs_whatever_they_are(watchdog: harness.Watchdog) -> None:
    noise = r'printf "a\000b\377\n"; head -c 300000 /dev/zero | tr "\000" x'
    script = f"echo out; echo err >&2; {noise}; echo; echo; printf last"
    server = watchdog.launch(["sh", "-c", script])
    server.wait(READY_S)
    assert server.log_path.read_bytes() == b"out\nerr\na\0b\xff\n" + b"x" * 300_000 + b"\n\nlast"
    assert server.log_tail(2) == "\nlast"
    assert server.log_tail(0) == ""
    assert len(server.log_tail()) < 5000


def test_a_log_tail_gives_the_last_lines(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(["sh", "-c", "seq 100; printf 'a\\000b\\377\\n'"])
    server.wait(READY_S)
    assert server.log_tail(3) == "99\n100\na\0b\N{REPLACEMENT CHARACTER}"
    assert server.log_tail().splitlines()[0] == "52"
    assert len(server.log_tail(1000).splitlines()) == 101


def test_names_are_free_text_and_logs_of_equal_names_do_not_meet(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    name = "../dp ü\n/0"
    servers = [watchdog.launch(["echo", str(number)], name=name) for number in range(2)]
    assert [server.wait(READY_S).name for server in servers] == [name, name]
    assert [server.log_tail() for server in servers] == ["0", "1"]
    assert all(tmp_path / "state" in server.log_path.resolve().parents for server in servers)


def test_logs_are_kept_in_the_directory_that_was_named(tmp_path: Path) -> None:
    with harness.Watchdog(state_dir=tmp_path / "state", log_dir=tmp_path / "a" / "logs") as watchdog:
        server = watchdog.launch(["echo", "{log_dir}"])
        server.wait(READY_S)
        assert server.log_tail() == str(tmp_path / "a" / "logs")
        assert server.log_path.parent == tmp_path / "a" / "logs"


def test_pids_are_the_whole_tree_with_its_daemons(watchdog: harness.Watchdog) -> None:
    plan = member("root", member("child", member("grandchild")), member("daemon", member("its child"), daemon=True))
    server = watchdog.launch(family(plan), ready=harness.log_line("^root ready")).wait_ready(READY_S)
    names = ("root", "child", "grandchild", "daemon", "its child")
    pids = {name: pid_of(server, name) for name in names}
    assert set(server.pids()) == set(pids.values())
    assert os.getsid(pids["daemon"]) != server.pid
    outcome = server.stop()
    assert (outcome.how, outcome.survivors) == ("asked", ())
    assert not [pid for pid in pids.values() if processes.identify(pid)]
    assert server.pids() == []


def test_a_life_from_running_to_gone(watchdog: harness.Watchdog) -> None:
    with watchdog.launch(["sh", "-c", "read line < /dev/null; exec sleep 60"]) as server:
        states = [(server.state, server.returncode, server.is_alive)]
        os.kill(server.pid, 9)
        outcome = server.wait(READY_S)
        states.append((server.state, server.returncode, server.is_alive))
    assert states == [("running", None, True), ("gone", -9, False)]
    assert (outcome.how, outcome.returncode, outcome.seconds) == ("exited", -9, 0.0)
    assert server.stop() == outcome
    assert "'sh-0'" in str(outcome)
    assert "SIGKILL" in str(outcome)


def test_a_root_that_leaves_a_daemon_is_detached_ready_and_stopped(watchdog: harness.Watchdog) -> None:
    plan = member("root", member("daemon", daemon=True), leaves=True)
    server = watchdog.launch(family(plan), ready=harness.log_line("^daemon ready"))
    assert server.proc.wait(READY_S) == 0
    assert server.wait_ready(READY_S).state == "detached"
    assert (server.returncode, server.is_alive) == (0, True)
    assert server.pids() == [pid_of(server, "daemon")]
    server.send_signal(15)  # to the root alone, which has exited: nothing happens
    outcome = server.stop()
    assert (outcome.how, outcome.returncode) == ("asked", 0)
    assert not processes.identify(pid_of(server, "daemon"))


def test_a_wait_that_is_too_short_says_so_and_leaves_the_server(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(["sleep", "60"], name="rank0")
    with pytest.raises(harness.NotReady, match=r"'rank0' \(pid \d+\) still runs after 0\.05 s") as caught:
        server.wait(0.05)
    assert caught.value.server == "rank0"
    assert server.state == "running"


def test_the_root_is_gone_but_not_the_tree(watchdog: harness.Watchdog) -> None:
    plan = member("root", member("daemon", daemon=True), leaves=True, code=3)
    server = watchdog.launch(family(plan))
    assert server.proc.wait(READY_S) == 3
    with pytest.raises(harness.NotReady):
        server.wait(0.05)
    os.kill(pid_of(server, "daemon"), 15)
    assert server.wait(READY_S).how == "exited"


@pytest.mark.skipif(shutil.which("setsid") is None, reason="util-linux's setsid is missing")
def test_a_foreign_daemoniser_does_not_escape(watchdog: harness.Watchdog) -> None:
    command = ["sh", "-c", 'setsid -f "$@"; setsid -f "$@"; echo ready; exec sleep 60', "sh", *STUBBORN]
    server = watchdog.launch(command, ready=lambda s: s.log_tail().split() == ["ready"] * 3, grace_s=0.2)
    people = processes.identities(server.wait_ready(READY_S).pids())
    assert len(people) == 5
    assert server.stop().how == "killed"
    assert not [who for who in people if processes.is_running(who)]
