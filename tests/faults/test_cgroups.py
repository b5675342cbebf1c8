"""Both ways to kill a server, through its cgroup and by the sweep alone, over the same servers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import cgroup_tree
import processes
import pytest
from faults.runs import TREE_SERVER, Watched
from servers.commands import FOLDER, READY_S

import harness
from harness.watchdog import cgroups, spawn
from harness.watchdog.log import Log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NOBODY = 65534
SLEEP = shutil.which("sleep") or "sleep"
CHECKOUT = Path(harness.__file__).parent.parent
READY = harness.log_line("ready")
STORM = [sys.executable, "-I", "-S", str(FOLDER / "storm.py"), "chains", "40", "60", os.devnull]
needs_cgroups = pytest.mark.skipif(cgroup_tree.own() is None, reason="this process's cgroup cannot be written to")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can hand a cgroup to another user")


@pytest.fixture(params=["cgroup", "sweep"])
def watchdog(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[harness.Watchdog]:
    if request.param == "sweep":
        monkeypatch.setenv("HARNESS_CGROUP", "off")
    elif cgroup_tree.own() is None:
        pytest.skip("this process's cgroup cannot be written to: there is no other kill path here than the sweep")
    owner = harness.Watchdog(state_dir=tmp_path / "state", crash_grace_s=0.5).start()
    yield owner
    try:
        owner.close()
    except harness.WatchdogDied:
        assert not owner.is_alive
    assert cgroup_tree.of_watchdog(owner.pid or 0) == []
    assert not list((tmp_path / "state").rglob("server-*.json"))


@pytest.fixture
def nobody_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process that inherited this test's environment may be left."""
    mark = f"HARNESS_CGROUP_TEST={os.getpid()}.{id(monkeypatch)}"
    monkeypatch.setenv(*mark.split("="))
    yield
    keepers = [pid for pid in processes.marked(mark) if processes.name(pid) in {"harness-keeper", "harness-watchd"}]
    processes.wait_gone(keepers, 5.0)
    assert processes.describe(processes.marked(mark)) == []


def tree(marks: Path) -> list[str]:
    return [sys.executable, "-I", "-S", str(TREE_SERVER), str(marks), "--ignore"]


def user(how: str) -> list[str]:
    return [sys.executable, "-I", "-S", str(FOLDER / "cgroup_user.py"), how]


def keeper_of(server: harness.Server) -> int:
    return processes.parent(server.pid)


@pytest.mark.usefixtures("nobody_is_left")
def test_a_tree_with_a_daemon(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    server = watchdog.launch(tree(tmp_path), ready=READY, grace_s=0.2).wait_ready(READY_S)
    with Watched(server.pids()) as watched:
        assert server.stop().how == "killed"
        assert watched.alive() == []


@pytest.mark.usefixtures("nobody_is_left")
def test_a_fork_storm_is_killed_in_the_middle(watchdog: harness.Watchdog) -> None:
    server = watchdog.launch(STORM, ready=READY).wait_ready(READY_S)
    server.kill()
    assert server.outcome is not None
    assert server.outcome.survivors == ()


@pytest.mark.usefixtures("nobody_is_left")
@pytest.mark.parametrize("lost", ["keeper", "watchdog"])
def test_a_fork_storm_whose_owner_is_lost(watchdog: harness.Watchdog, lost: str) -> None:
    server = watchdog.launch(STORM, ready=READY, grace_s=0.2).wait_ready(READY_S)
    keeper = keeper_of(server)
    with Watched([keeper]) as watched:
        os.kill(keeper if lost == "keeper" else watchdog.pid or 0, signal.SIGKILL)
        assert watched.wait_gone(20.0) == []
    if lost == "keeper":
        server.stop()


@needs_cgroups
@pytest.mark.usefixtures("nobody_is_left")
@pytest.mark.parametrize("watchdog", ["cgroup"], indirect=True)  # elsewhere it has no cgroup of its own to use
@pytest.mark.parametrize("how", ["below", "leave", "exit"])
def test_a_server_that_uses_cgroups_itself(watchdog: harness.Watchdog, how: str) -> None:
    server = watchdog.launch(user(how), ready=READY, grace_s=0.2, env={"MOUNT": str(cgroup_tree.mounted())})
    with Watched([server.wait_ready(READY_S).pid, *server.pids()]) as watched:
        own = Path(server.log_tail().splitlines()[0])
        assert own.parent.name.startswith(f"harness-{watchdog.pid}-")
        server.stop(grace_s=10.0 if how == "exit" else 0.2)
        assert watched.alive() == []
    assert not own.exists()


@pytest.mark.usefixtures("nobody_is_left")
def test_the_last_keeper_of_a_dead_watchdog_removes_its_cgroup(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    servers = [watchdog.launch(tree(tmp_path), ready=READY, grace_s=0.2).wait_ready(READY_S) for _ in range(3)]
    with Watched([keeper_of(server) for server in servers]) as watched:
        os.kill(watchdog.pid or 0, signal.SIGKILL)
        assert watched.wait_gone(20.0) == []
    assert cgroup_tree.of_watchdog(watchdog.pid or 0) == []


@needs_cgroups
def test_the_root_is_born_in_a_cgroup_and_the_keeper_is_not(tmp_path: Path) -> None:
    with harness.Watchdog(state_dir=tmp_path / "state") as watchdog:
        server = watchdog.launch(["sleep", "60"])
        (made,) = cgroup_tree.of_watchdog(watchdog.pid or 0)
        assert [int(pid) for pid in (made / "1" / "cgroup.procs").read_text(encoding="ascii").split()] == [server.pid]
        assert keeper_of(server) not in cgroups.members(str(made))


@needs_cgroups
@pytest.mark.parametrize("lost", [None, "keeper", "watchdog"])
def test_who_is_put_into_the_cgroup_is_killed_with_it_alone(tmp_path: Path, lost: str | None) -> None:
    """He is in no tree of ours, so nothing but cgroup.kill reaches him; he who is in another server's cgroup lives."""
    watchdog = harness.Watchdog(state_dir=tmp_path / "state", crash_grace_s=0.2).start()
    servers = [watchdog.launch(tree(tmp_path), ready=READY, grace_s=0.2).wait_ready(READY_S) for _ in range(2)]
    guests = [subprocess.Popen([SLEEP, "60"]) for _ in servers]
    for guest, server in zip(guests, servers, strict=True):
        cgroup = Path(f"/proc/{server.pid}/cgroup").read_text(encoding="utf-8").partition("0::/")[2].strip()
        (cgroup_tree.mounted() / cgroup / "cgroup.procs").write_text(str(guest.pid), encoding="ascii")
    if lost == "watchdog":
        os.kill(watchdog.pid or 0, signal.SIGKILL)
        assert guests[1].wait(20.0) == -signal.SIGKILL
    else:
        if lost == "keeper":
            os.kill(keeper_of(servers[0]), signal.SIGKILL)
        servers[0].stop()
        assert guests[1].poll() is None
    assert guests[0].wait(20.0) == -signal.SIGKILL
    try:
        watchdog.close()
    except harness.WatchdogDied:
        assert lost == "watchdog"
    assert guests[1].wait(20.0) == -signal.SIGKILL


def test_a_root_that_cannot_be_born_in_its_cgroup_is_born_outside(tmp_path: Path) -> None:
    log = Log(str(tmp_path / "runs" / "7-1" / "watchdog.log"))
    child = spawn._fork_into(str(tmp_path / "none"), log)
    if child == 0:
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    (path,) = tmp_path.rglob("watchdog.log")
    assert "outside of its cgroup: No such file or directory" in path.read_text(encoding="utf-8")


@needs_cgroups
def test_a_cgroup_of_a_watchdog_that_died_idle_is_removed_by_the_next_one(tmp_path: Path) -> None:
    first = harness.Watchdog(state_dir=tmp_path / "state").start()
    first.launch(["true"]).wait()
    with Watched([first.pid or 0]) as watched:
        os.kill(first.pid or 0, signal.SIGKILL)
        assert watched.wait_gone(10.0) == []
    with pytest.raises(harness.WatchdogDied):
        first.close()
    with harness.Watchdog(state_dir=tmp_path / "state") as watchdog:
        watchdog.launch(["true"]).wait()
        assert cgroup_tree.of_watchdog(first.pid or 0) == []


def test_a_launch_goes_on_when_its_cgroup_is_taken_away(tmp_path: Path) -> None:
    """There is none to be born in: the first one is removed with the watchdog's, as an administrator may do."""
    if cgroup_tree.own() is None:
        pytest.skip("this process's cgroup cannot be written to")
    with harness.Watchdog(state_dir=tmp_path / "state") as watchdog:
        watchdog.launch(["true"]).wait()
        (made,) = cgroup_tree.of_watchdog(watchdog.pid or 0)
        made.rmdir()
        assert watchdog.launch(["sleep", "60"]).stop().how == "asked"
    log = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "state").rglob("watchdog.log"))
    assert "cannot make the cgroup" in log


# ---- an ordinary user

_AS_NOBODY = """
import json, os, sys
cgroup, home, code = sys.argv[1:]
if cgroup:
    with open(cgroup + "/cgroup.procs", "w") as file:
        file.write("0")
os.setgroups([]); os.setgid({nobody}); os.setuid({nobody})
os.chdir(home)
os.environ["HARNESS_STATE_DIR"] = home + "/state"
exec(code)
"""
_RUN = """
    import harness, subprocess
    with harness.Watchdog() as watchdog:
        script = "cat /proc/self/cgroup; trap '' TERM; setsid sleep 100 & echo ready; wait"
        ready = harness.log_line("ready")
        server = watchdog.launch(["sh", "-c", script], ready=ready, grace_s=0.2).wait_ready(30)
        tail, pids = server.log_tail(), server.pids()
        how = server.stop().how
    left = [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    doctor = subprocess.run([sys.executable, "-m", "harness", "doctor"], capture_output=True, text=True, check=False)
    print(json.dumps([tail, how, left, len(pids), doctor.stdout]))
"""


def _python_for_everybody() -> str:
    """Give an interpreter that the user nobody can run with this checkout: this one may be in a directory of root."""
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        code = f"import sys; sys.path.insert(0, {str(CHECKOUT)!r}); import harness.doctor"
        if Path(python).exists() and _runs_as_nobody([python, "-c", code]):
            return python
    pytest.skip("there is no interpreter that another user can run here")


def _runs_as_nobody(command: list[str]) -> bool:
    try:
        done = subprocess.run(
            command, cwd="/", user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, check=False
        )
    except PermissionError:
        return False
    return done.returncode == 0


def as_nobody(cgroup: Path | None) -> list[str | int | list[int]]:
    with tempfile.TemporaryDirectory() as home:
        os.chown(home, NOBODY, NOBODY)
        script = _AS_NOBODY.format(nobody=NOBODY)
        command = [_python_for_everybody(), "-c", script, str(cgroup or ""), home, textwrap.dedent(_RUN)]
        environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    result: list[str | int | list[int]] = json.loads(done.stdout)
    return result


@pytest.fixture
def delegated() -> Iterator[Callable[..., Path]]:
    """Give a function that makes a cgroup and hands these files of it to the user nobody."""
    above = cgroup_tree.own()
    assert above is not None
    made = above / f"test-of-harness-{os.getpid()}"

    def make(*names: str) -> Path:
        made.mkdir()
        for name in names:
            os.chown(made / name, NOBODY, NOBODY)
        return made

    yield make
    assert [path.name for path in made.iterdir() if path.is_dir()] == []
    made.rmdir()


@needs_root
@needs_cgroups
def test_a_delegated_cgroup_serves_an_ordinary_user(delegated: Callable[..., Path]) -> None:
    made = delegated(".", "cgroup.procs")
    tail, how, left, count, doctor = as_nobody(made)
    assert f"/{made.name}/harness-" in str(tail)
    assert (how, left, count) == ("killed", [], 2)
    assert f"ok   kill path: cgroup.kill, below {made}" in str(doctor)


@needs_root
@needs_cgroups
@pytest.mark.parametrize("names", [(), (".",)], ids=["nothing", "but not the right to move processes"])
def test_a_cgroup_that_cannot_be_used_is_named(delegated: Callable[..., Path], names: tuple[str, ...]) -> None:
    made = delegated(*names)
    tail, how, left, _, doctor = as_nobody(made)
    assert "/harness-" not in str(tail)
    assert (how, left) == ("killed", [])
    assert f"(this process's own cgroup, {made}, does not allow it: Permission denied) -> systemd-run" in str(doctor)


# ---- what the kernel's files say


@pytest.mark.parametrize(
    ("cgroup", "mountinfo", "directory", "reason"),
    [
        (
            "0::/a b",
            r"41 31 0:38 / /sys/fs/cgroup/uni\040fied rw - cgroup2 cgroup2 rw",
            "/sys/fs/cgroup/uni fied/a b",
            "",
        ),
        ("1:cpu:/x\n0::/", "32 31 0:29 / /c rw - cgroup cgroup rw\n41 31 0:38 / /u rw - cgroup2 n rw", "/u", ""),
        ("0::/docker/x/y", "41 31 0:38 /docker/x /u rw shared:1 - cgroup2 n rw", "/u/y", ""),
        ("0::/docker/xy", "41 31 0:38 /docker/x /u rw - cgroup2 n rw", "", "is outside of what is mounted at /u"),
        ("0::/../y", "41 31 0:38 / /u rw - cgroup2 n rw", "", "is outside of what is mounted at /u"),
        ("1:cpu:/x", "32 31 0:29 / /c rw - cgroup cgroup rw", "", "no cgroup v2 is mounted here"),
        ("0::/x", "32 31 0:29 / /c rw - cgroup cgroup rw", "", "no cgroup v2 is mounted here"),
    ],
)
def test_where_the_own_cgroup_is(
    monkeypatch: pytest.MonkeyPatch, cgroup: str, mountinfo: str, directory: str, reason: str
) -> None:
    files = {"/proc/self/cgroup": cgroup, "/proc/self/mountinfo": mountinfo}
    monkeypatch.setattr(cgroups, "_lines", lambda path: files[path].split("\n"))
    place = cgroups.own()
    assert place.directory == directory
    assert place.reason.endswith(reason)
