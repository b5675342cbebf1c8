"""Where a value of a server's environment, which may be a token, must never be seen; and that nobody is listened to."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from faults.held import Traced
from faults.pending import Pending
from faults.runs import TREE_SERVER
from faults.test_interrupts import Interrupt, interrupted_after

import harness
from harness import messages, procfs

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT_S = 30.0
READY = harness.log_line("ready")


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    """Give a text that is in this process's environment, and nowhere else."""
    token = f"token-{uuid.uuid4().hex}"
    monkeypatch.setenv("INHERITED_TOKEN", token)
    return token


def secrets() -> dict[str, str]:
    """Give variables with that text: whoever calls this in place keeps none of them in a local."""
    token = os.environ["INHERITED_TOKEN"]
    return {"PLAIN": token, "TEMPLATED": token + "{port}{name}", "LARGE": token * 2600}


def server_command(marks: Path, *options: str) -> list[str]:
    return [sys.executable, "-I", "-S", str(TREE_SERVER), str(marks), *options]


# ---- errors, with every local of every frame that they passed


def shown(error: BaseException | None, but: tuple[str, ...] = ()) -> str:
    """Show an error in every way, with the locals of all frames but this file's, as --full-trace --showlocals -vv."""
    if error is None:
        return ""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    seen = [frame for frame in frames if frame.f_code.co_filename != __file__ and frame.f_code.co_name not in but]
    texts = [_repr(value) for frame in seen for value in frame.f_locals.values()]
    texts += [repr(error), str(error), shown(error.__cause__ or error.__context__, but)]
    if isinstance(error, harness.HarnessError):
        texts += [pickle.dumps(error).decode(errors="replace"), repr(pickle.loads(pickle.dumps(error)))]  # noqa: S301
    return "\n".join(texts)


def _repr(value: object) -> str:
    try:
        return repr(value)
    except Exception as error:  # noqa: BLE001 - an object whose making was interrupted may not even have a repr
        return repr(error)


def ended(watchdog: harness.Watchdog) -> None:
    os.kill(watchdog.pid or 0, signal.SIGKILL)
    watchdog.launch(["sleep", "1000"], env=secrets())


FAILURES: dict[str, tuple[type[BaseException], Callable[[harness.Watchdog], object]]] = {
    "no program": (harness.LaunchFailed, lambda dog: dog.launch(["/no/such/program"], env=secrets())),
    "no directory": (harness.SpecError, lambda dog: dog.launch(["true"], cwd="/no/such", env=secrets())),
    "too large": (harness.SpecError, lambda dog: dog.launch(["true"], env={"A": secrets()["LARGE"] * 100})),
    "too many arguments": (harness.LaunchFailed, lambda dog: dog.launch(["true"], env={"A": secrets()["LARGE"] * 2})),
    "NUL": (harness.SpecError, lambda dog: dog.launch(["true"], env={**secrets(), "A": secrets()["PLAIN"] + "\0"})),
    "no text": (harness.SpecError, lambda dog: dog.launch(["true"], env={**secrets(), "A": 5})),  # type: ignore[dict-item]
    "a wrong name": (harness.SpecError, lambda dog: dog.launch(["true"], env={**secrets(), "A=": "b"})),
    "no port": (harness.SpecError, lambda dog: dog.launch(["true"], env={"A": secrets()["PLAIN"] + "{port:none}"})),
    "a group": (harness.LaunchFailed, lambda dog: dog.group().launch(["/no/such/program"], env=secrets())),
    "not ready": (
        harness.NotReady,
        lambda dog: dog.launch(["sleep", "1000"], ready=READY, env=secrets()).wait_ready(timeout_s=0.2),
    ),
    "a failing check": (
        harness.NotReady,
        lambda dog: dog.launch(["sleep", "1000"], ready=lambda _: bool(1 / 0), env=secrets()).wait_ready(),
    ),
    "exited": (
        harness.ServerExited,
        lambda dog: dog.launch(["sh", "-c", "exit 3"], ready=READY, env=secrets()).wait_ready(timeout_s=TIMEOUT_S),
    ),
    "watchdog killed": (harness.WatchdogDied, ended),
}


@pytest.mark.parametrize("what", FAILURES)
def test_no_error_shows_it(guarded: harness.Watchdog, secret: str, what: str) -> None:
    kind, fail = FAILURES[what]
    with pytest.raises(kind) as caught:
        fail(guarded)
    assert type(caught.value) is kind
    assert secret not in shown(caught.value)


def test_no_leak_shows_it(guarded: harness.Watchdog, secret: str, tmp_path: Path) -> None:
    holder = Traced()
    try:
        server = guarded.launch(server_command(tmp_path), ready=READY, env=secrets(), grace_s=0.3).wait_ready(TIMEOUT_S)
        holder.hold([server.pid])
        with pytest.raises(harness.Leaked) as caught:
            guarded.stop([server]).raise_if_leaked()
        assert secret not in shown(caught.value)
    finally:
        holder.release()


# One that strikes in a callback of a weak reference is reported by Python, and lost.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_interrupt_of_a_launch_shows_it(guarded: harness.Watchdog, secret: str) -> None:
    errors = [interrupt(guarded, 0.00002 + 0.0001 * number) for number in range(80)]
    own = {"secrets"}  # an interrupt that strikes in this file's function is not the harness's
    interrupts = [error for error in errors if error is not None and not own & set(names(error))]
    assert interrupts
    for error in interrupts:
        # `launch` seals its argument first; an interrupt that strikes before that finds what the caller gave.
        assert secret not in shown(error, but=("launch", "sealed"))


def names(error: BaseException) -> list[str]:
    """Give the functions that an error has passed."""
    return [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]


def interrupt(watchdog: harness.Watchdog, after_s: float) -> Interrupt | None:
    try:
        with interrupted_after(after_s):
            watchdog.launch(["sleep", "1000"], env=secrets()).kill()
    except Interrupt as error:
        return error
    return None


def test_a_launch_that_waits_shows_it_to_nobody(guarded: harness.Watchdog, secret: str, tmp_path: Path) -> None:
    with Pending(tmp_path) as pending, pytest.raises(Interrupt) as caught, interrupted_after(3.0):
        guarded.launch(pending.command, env=secrets())
    assert any("channel.py" in str(entry.path) for entry in caught.traceback)
    assert secret not in shown(caught.value)


# ---- pytest's output, files, and what everybody can see of processes

SUITE = """
    import asyncio, json, os, pathlib, signal, sys, threading
    import pytest
    import harness
    from faults.pending import Pending

    HERE = pathlib.Path(__file__).parent

    def env(**more):
        token = os.environ["INHERITED_TOKEN"]
        return {{"PLAIN": token, "TEMPLATED": token + "{{port}}", "LARGE": token * 2600, **more}}

    @pytest.fixture(autouse=True)
    def server(server_group):
        return server_group.launch({command!r}, ready=harness.log_line("ready"), env=env(), grace_s=0.2).wait_ready(60)

    def test_launch_failed(server_group):
        server_group.launch(["/no/such/program"], env=env())

    def test_async_launch_failed(server_group):
        asyncio.run(server_group.launch_async(["/no/such/program"], env=env()))

    def test_async_launch_cancelled(server_group, tmp_path):
        with Pending(tmp_path) as pending:
            asyncio.run(asyncio.wait_for(server_group.launch_async(pending.command, env=env()), 0.2))

    @pytest.mark.timeout(1, method="signal")
    def test_async_hangs_in_launch(server_group, tmp_path):
        with Pending(tmp_path) as pending:
            asyncio.run(server_group.launch_async(pending.command, env=env()))

    def test_spec_error(server_group):
        server_group.launch(["true"], env=env(A=env()["PLAIN"] + "\\0"))

    def test_no_port(server_group):
        server_group.launch(["true"], env=env(A=env()["PLAIN"] + "{{port:none}}"))

    def test_not_ready(server_group):
        server_group.launch(["sleep", "1000"], env=env(), ready=lambda server: False)
        server_group.wait_ready(timeout_s=0.2)

    def test_server_exited(server_group):
        server_group.launch(["false"], env=env(), ready=harness.log_line("x")).wait_ready(timeout_s=60)

    @pytest.mark.timeout(1, method="signal")
    def test_hangs_in_launch(server_group, tmp_path):
        with Pending(tmp_path) as pending:
            server_group.launch(pending.command, env=env())

    def test_watchdog_died(tmp_path):
        with harness.Watchdog(state_dir=HERE / "state") as watchdog:
            watchdog.launch(["sleep", "1000"], env=env())
            os.kill(watchdog.pid, signal.SIGKILL)
            watchdog.launch(["sleep", "1000"], env=env())

    def test_z_interrupted(server_group, tmp_path):
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
        with Pending(tmp_path) as pending:
            server_group.launch(pending.command, env=env())
"""


ERRORS = ("LaunchFailed", "SpecError", "NotReady", "ServerExited", "WatchdogDied")


@pytest.mark.parametrize("options", [["--tb=long"], ["--full-trace"], ["--tb=native", "-s"]], ids=" ".join)
def test_pytest_shows_it_nowhere(tmp_path: Path, secret: str, options: list[str]) -> None:
    suite = SUITE.format(command=server_command(tmp_path))
    (tmp_path / "test_suite.py").write_text("\n".join(line[4:] for line in suite.splitlines()), encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nharness_crash_grace_s = 0.5\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--showlocals", "-vv", *options]
    command += ["--harness-log-dir", "logs", "--junitxml", "report.xml", "--basetemp", str(tmp_path / "temp")]
    environment = {**os.environ, "HARNESS_STATE_DIR": str(tmp_path / "state")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(
        [*command, "test_suite.py"], cwd=tmp_path, env=environment, capture_output=True, timeout=90, check=False
    )
    output = (done.stdout + done.stderr).decode(errors="replace")
    assert done.returncode == 2, output  # interrupted
    for kind in (
        "LaunchFailed",
        "SpecError",
        "NotReady",
        "ServerExited",
        "Timeout",
        "WatchdogDied",
        "KeyboardInterrupt",
    ):
        assert kind in output
    where = [line[:200] for line in output.splitlines() if secret in line]
    assert where == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if secret.encode() in path.read_bytes()] == []


@pytest.fixture
def running(guarded: harness.Watchdog, tmp_path: Path, secret: str) -> harness.Watchdog:
    """Give a watchdog with servers in several phases, all with the secret."""
    assert secret
    for options in ([], ["--ignore"]):
        command = server_command(tmp_path, *options)
        guarded.launch(command, env=secrets(), ports=["more"], ready=READY, grace_s=0.5).wait_ready(TIMEOUT_S)
    return guarded


def ours(watchdog: harness.Watchdog) -> list[int]:
    """Give the pids of the watchdog and of its keepers."""
    keepers = procfs.children(watchdog.pid or 0)
    assert len(keepers) == 2
    return [watchdog.pid or 0, *keepers]


def test_no_process_of_ours_shows_it(running: harness.Watchdog, secret: str, tmp_path: Path) -> None:
    for pid in ours(running):
        for name in ("cmdline", "environ", "comm"):
            assert secret.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert not [entry for entry in environment if entry.startswith((b"PYTHON", b"HOME=", b"INHERITED_TOKEN="))]
    (server, _) = running.servers
    assert secret.encode() in Path(f"/proc/{server.pid}/environ").read_bytes()  # it is where it belongs
    assert secret not in repr(running) + repr(running.servers) + repr(running.stop(running.servers))
    running.close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    assert any(path.name == "watchdog.log" for path in files)


def test_no_message_shows_it(secret: str) -> None:
    launch = messages.Launch(
        "a",
        ["true"],
        secrets(),
        ["PLAIN"],
        "/",
        [],
        "/log",
        "/",
        "root",
        1.0,
        None,
        None,
        [],
        None,
        "",
        is_literal=False,
    )
    assert secret.encode() in bytes(messages.encode(launch))
    assert secret not in repr(launch) + repr(messages.encode(launch))


# ---- sockets


def open_to_others(pid: int) -> list[str]:
    """Give the lines of /proc/net that show a socket of this process through which another can reach it."""
    links = [_link(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    found = []
    for table in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6", "unix", "netlink", "packet"):
        path = Path(f"/proc/net/{table}")
        for line in path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []:
            fields = line.split()
            # proc(5): the inode's column; a Unix socket that accepts connections, or has a name, can be reached.
            column = {"unix": 6, "netlink": 9, "packet": 8}.get(table, 9)
            can_be_reached = table != "unix" or len(fields) > column + 1 or int(fields[3], 16) & 0x10000
            if len(fields) > column and fields[column] in inodes and can_be_reached:
                found.append(f"{table} {line}")
    return found


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return ""  # the one that listed them


def test_nobody_is_listened_to(running: harness.Watchdog) -> None:
    for pid in ours(running):
        assert open_to_others(pid) == []


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
def test_a_listening_socket_would_be_found(family: socket.AddressFamily) -> None:
    addresses: dict[int, Any] = {socket.AF_INET: ("127.0.0.1", 0), socket.AF_INET6: ("::1", 0), socket.AF_UNIX: ""}
    before = len(open_to_others(os.getpid()))
    with socket.socket(family) as listener:
        listener.bind(addresses[family])
        listener.listen()
        assert len(open_to_others(os.getpid())) == before + 1
