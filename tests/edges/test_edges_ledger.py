"""The ledger: what is written, what of it is believed, and who is never harmed, whatever it says."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import processes
import pytest
from servers.commands import READY_S, STUBBORN

import harness
from harness import command_line, doctor, entries, logs, remains, runs, state_dir
from harness.messages import Launch
from harness.watchdog import kept, ledger
from harness.watchdog.log import Log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SLEEP = shutil.which("sleep") or "sleep"
DEAD = (2**22 - 1, 1)
RUN = f"{DEAD[0]}-{DEAD[1]}"
NAME = f"server-{RUN}-1.json"
SECRET = "sekrit-0815"  # noqa: S105 - it stands for one


@pytest.fixture
def bystander() -> Iterator[processes.Identity]:
    """Run a process that has nothing to do with any server."""
    with subprocess.Popen([SLEEP, "60"], start_new_session=True, stdin=subprocess.DEVNULL) as process:
        who = processes.identify(process.pid)
        assert who is not None
        yield who
        process.kill()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "runs" / RUN).mkdir(parents=True, mode=0o700)
    return tmp_path / "state"


def facts(**changes: object) -> dict[str, Any]:
    """Give the facts of a server whose run is dead."""
    found: dict[str, Any] = {
        "version": ledger.VERSION,
        "boot": ledger.boot(),
        "namespace": ledger.namespace(),
        "client": DEAD,
        "watchdog": DEAD,
        "keeper": DEAD,
        "root": DEAD,
        "name": "it",
        "mark": f"{RUN}/{RUN}-1/0123456789abcdef",
        "log": "/nowhere/it.log",
        "file": [1, 1],
        "cgroup": ["", 0],
        "members": [],
        **changes,
    }
    return {name: value for name, value in found.items() if value is not ...}


def record(state: Path, **changes: object) -> Path:
    found = facts(**changes)
    name = "-".join(map(str, found["watchdog"]))
    found["mark"] = f"{RUN}/{name}-1/0123456789abcdef"
    return write(state, json.dumps(found), f"server-{name}-1.json")


def write(state: Path, text: str, name: str = NAME) -> Path:
    path = state / "runs" / RUN / name
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    return path


def found_in(state: Path) -> list[int]:
    return [each.pid for stats in remains.find(state).processes.values() for each in stats]


def who(pid: int) -> entries.Identity:
    """Say who has this pid, as an entry does; read without the harness."""
    found = processes.identify(pid)
    assert found is not None
    return entries.Identity(*found)


# ---- what is acted on


def test_a_member_of_a_dead_run_is_found_and_ended(state: Path, bystander: processes.Identity) -> None:
    """The other tests say that somebody is left alone; this is the proof that the same entry could harm him."""
    path = record(state, members=[bystander])
    assert found_in(state) == [bystander.pid]
    assert remains.end(state, limit_s=5.0).is_empty
    assert not processes.is_running(bystander)
    assert not path.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"boot": "another"},
        {"namespace": "pid:[1]"},
        {"watchdog": (os.getpid(), None)},
        {"keeper": (os.getpid(), None)},
    ],
    ids=["another boot", "another PID namespace", "the watchdog lives", "the keeper lives"],
)
def test_nobody_is_touched_for_a_run_that_is_not_dead_here(
    state: Path, bystander: processes.Identity, changes: dict[str, Any]
) -> None:
    alive = processes.identify(os.getpid())
    path = record(state, members=[bystander], **{k: alive if isinstance(v, tuple) else v for k, v in changes.items()})
    assert found_in(state) == []
    assert remains.end(state, limit_s=5.0).is_empty
    assert processes.is_running(bystander)
    assert path.exists() == ("boot" not in changes)


def test_nobody_is_touched_while_a_keeper_holds_the_entry(state: Path, bystander: processes.Identity) -> None:
    """The keeper may not have been able to say who it is."""
    path = record(state, keeper=..., members=[bystander])
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not runs.has_unheld_entries(state)
        assert found_in(state) == []
    assert found_in(state) == [bystander.pid]


def test_a_reused_number_and_the_caller_himself_are_left_alone(state: Path, bystander: processes.Identity) -> None:
    mine = [processes.identify(os.getpid()), processes.identify(os.getppid())]
    record(state, members=[(bystander.pid, bystander.start_time + 1), *mine])
    assert found_in(state) == []


def daemon(*, descriptor: int) -> tuple[int, processes.Identity]:
    """Start a process in the session of a leader that has ended; give that session and the process."""
    code = "import os; os.setsid(); pid = os.fork(); pid and (print(os.getpid(), pid, flush=True), os._exit(0));"
    command = [sys.executable, "-c", f"{code} os.execvp('sleep', ['sleep', '60'])"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=descriptor, text=True) as leader:
        assert leader.stdout is not None
        session, pid = map(int, leader.stdout.readline().split())
        leader.stdout.close()
    who = processes.identify(pid)
    assert who is not None
    return session, who


@pytest.fixture
def start_daemon() -> Iterator[Callable[[int], tuple[int, processes.Identity]]]:
    started: list[processes.Identity] = []

    def start(descriptor: int = subprocess.DEVNULL) -> tuple[int, processes.Identity]:
        session, who = daemon(descriptor=descriptor)
        started.append(who)
        return session, who

    yield start
    for who in started:
        if processes.is_running(who):
            os.kill(who.pid, 9)
    processes.wait_gone(started, 10.0)


def test_a_session_whose_number_was_given_away_proves_nothing(
    state: Path, start_daemon: Callable[[], tuple[int, processes.Identity]]
) -> None:
    session, _ = start_daemon()
    record(state, root=(session, 1))
    assert found_in(state) == []


@pytest.mark.parametrize(
    ("name", "mode", "is_found"),
    [("it.log", "ab", True), ("it.log", "rb", False), ("renamed.log", "ab", False)],
    ids=["written", "only read", "of another name"],
)
def test_who_writes_the_servers_log_is_found(
    state: Path, start_daemon: Callable[..., tuple[int, processes.Identity]], name: str, mode: str, is_found: object
) -> None:
    log = state / name
    log.touch()
    with log.open(mode) as file:
        _, who = start_daemon(file.fileno())
    record(state, log=str(state / "it.log"), file=[log.stat().st_dev, log.stat().st_ino])
    assert found_in(state) == ([who.pid] if is_found else [])


# ---- what is not believed

_DEEP = '{"version": ' + "[" * 100_000
HOSTILE: dict[str, tuple[Any, str]] = {
    "nothing": ("", "its version is not"),
    "no JSON": ("\0\xff{", "it is not JSON"),
    "deep": (_DEEP, "it is not JSON"),
    "a list": ("[1]", "it holds no object"),
    "huge": ('{"version": 1}' + " " * (1 << 20), "bytes"),
    "another version": ({"version": 2}, "its version is not 1"),
    "pid 1": ({"members": [[1, 5]]}, "process 1 in it"),
    "pid 0": ({"root": [0, 5]}, "process 0 in it"),
    "a negative pid": ({"root": [-7, 5]}, "a pair of numbers"),
    "a huge pid": ({"members": [[2**40, 5]]}, "none that could be recorded"),
    "a pid that is a text": ({"root": ["7", 5]}, "a pair of numbers"),
    "a pid that is true": ({"root": [True, 5]}, "a pair of numbers"),
    "a pid that is a fraction": ({"root": [7.5, 5]}, "a pair of numbers"),
    "members that are none": ({"members": 7}, "its members are no list"),
    "no watchdog": ({"watchdog": ...}, "a pair of numbers"),
    "a name that is none": ({"name": 7}, "its name is no text"),
    "a log with a NUL": ({"log": "/a\0b"}, "its log is no text"),
    "another's mark": ({"mark": "1-2/1/0123456789abcdef"}, "its mark is that of another"),
    "a mark that is too short": ({"mark": f"{RUN}/{RUN}-1/"}, "its mark is that of another"),
    "somebody's cgroup": ({"cgroup": ["/sys/fs/cgroup/user.slice", 1]}, "its cgroup is not one"),
    "another watchdog's cgroup": ({"cgroup": ["/sys/fs/cgroup/harness-5-6/1", 1]}, "its cgroup is not one"),
    "a cgroup elsewhere": ({"cgroup": [f"/sys/fs/cgroup/x/../harness-{RUN}/1", 1]}, "its cgroup is not one"),
    "a relative cgroup": ({"cgroup": [f"harness-{RUN}/1", 1]}, "its cgroup is not one"),
}


@pytest.mark.parametrize("case", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_entry_is_reported_and_harms_nobody(
    state: Path, bystander: processes.Identity, case: tuple[Any, str], capsys: pytest.CaptureFixture[str]
) -> None:
    content, reason = case
    members = content.get("members", [bystander]) if isinstance(content, dict) else []
    text = json.dumps(facts(**{"members": members, **content})) if isinstance(content, dict) else content
    path = write(state, text)
    for options in ([], ["--yes"], ["--json"]):
        assert command_line.main(["sweep", "--state-dir", str(state), *options]) == 1
    shown = capsys.readouterr().out
    assert f"{path} cannot be read: " in shown
    assert reason in shown
    assert state_dir.new_run(state).parent == state / "runs"
    assert processes.is_running(bystander)
    assert path.exists()


def plant_link(path: Path) -> None:
    path.symlink_to(path.with_name("target"))
    path.with_name("target").write_text(json.dumps(facts()), encoding="utf-8")


def plant_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as planted:
        directory = os.open(path.parent, os.O_RDONLY)
        planted.bind(f"/proc/self/fd/{directory}/{path.name}")
        os.close(directory)


def plant_writable(path: Path) -> None:
    path.write_text(json.dumps(facts()), encoding="utf-8")
    path.chmod(0o666)


@pytest.mark.parametrize(
    "plant",
    [plant_link, os.mkfifo, Path.mkdir, plant_socket, plant_writable],
    ids=["link", "FIFO", "directory", "socket", "writable"],
)
def test_an_entry_that_is_no_file_of_ours_is_reported(state: Path, plant: Callable[[Path], None]) -> None:
    path = state / "runs" / RUN / NAME
    plant(path)
    began = time.monotonic()
    assert list(remains.end(state, limit_s=5.0).unreadable) == [path]
    assert time.monotonic() - began < 4.5
    state_dir.new_run(state)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_another_users_entry_and_run_are_not_believed(state: Path, bystander: processes.Identity) -> None:
    path = record(state, members=[bystander])
    os.chown(path, 12345, -1)
    assert "belongs to user 12345" in remains.find(state).unreadable[path]
    os.chown(path, 0, -1)
    os.chown(path.parent, 12345, -1)
    assert remains.find(state).is_empty


def test_a_torn_line_loses_itself_alone(state: Path, bystander: processes.Identity) -> None:
    first = json.dumps(facts(members=...))
    write(state, f'{first}\n\n{{"members": [[12, \n{{"members": {json.dumps([bystander])}}}\n\n{{"kee')
    assert found_in(state) == [bystander.pid]


@pytest.mark.parametrize("name", ["\N{SUPERSCRIPT TWO}-1", "1-", "-1", "0-1", "1-2-3", "1" * 40 + "-1", "..", "a\nb-1"])
def test_hostile_names_among_the_runs(tmp_path: Path, name: str) -> None:
    (tmp_path / "runs" / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / "runs" / "7-1").touch()
    assert runs.directories(tmp_path) == []
    assert state_dir.new_run(tmp_path).parent == tmp_path / "runs"


def test_links_in_place_of_directories_lead_nowhere(tmp_path: Path) -> None:
    victim = tmp_path / "victim" / RUN
    victim.mkdir(parents=True)
    (victim / "server-1.json").write_text("{}", encoding="ascii")
    os.utime(victim / "server-1.json", (1, 1))
    for state in (tmp_path / "a", tmp_path / "b"):
        state.mkdir(mode=0o700)
    (tmp_path / "a" / "runs").symlink_to(victim.parent)
    (tmp_path / "b" / "runs").mkdir()
    (tmp_path / "b" / "runs" / RUN).symlink_to(victim)
    for state in (tmp_path / "a", tmp_path / "b"):
        state_dir.new_run(state)
        assert remains.find(state).is_empty
    assert (victim / "server-1.json").exists()


# ---- what is written


def test_an_entry_is_there_and_locked_before_the_keeper_is_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "7-1"
    seen: list[entries.Entry | None] = []

    def fail(*_arguments: object) -> None:
        (path,) = run.glob("server-*")
        assert runs.is_held(path)
        seen.append(entries.read(path))
        raise OSError(11, "no more processes")

    monkeypatch.setattr(kept, "_fork", fail)
    launch = Launch(
        "it",
        ["a"],
        {},
        [],
        "/",
        [],
        str(run / "it.log"),
        str(run),
        "root",
        1.0,
        None,
        None,
        [],
        None,
        "",
        is_literal=False,
    )
    log = Log(str(run / "watchdog.log"))
    book = ledger.Ledger(str(run), os.getppid(), log, use_cgroups=False)
    with pytest.raises(OSError, match="no more processes"):
        kept.Kept(1, launch, log, book, crash_grace_s=1.0)
    assert [entry.watchdog for entry in seen if entry] == [who(os.getpid())]
    assert [entry.client for entry in seen if entry] == [who(os.getppid())]
    assert not list(run.glob("server-*"))
    book.close()
    os.close(log._descriptor or 0)


def test_a_full_disk_costs_the_entry_not_the_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "7-1"
    log = Log(str(run / "watchdog.log"))
    book = ledger.Ledger(str(run), os.getppid(), log, use_cgroups=False)
    launch = Launch(
        "it",
        ["a"],
        {},
        [],
        "/",
        [],
        str(run / "it.log"),
        str(run),
        "root",
        1.0,
        None,
        None,
        [],
        None,
        "",
        is_literal=False,
    )
    monkeypatch.setattr(
        "harness.watchdog.ledger.os.write",
        lambda descriptor, data: 1 if b"{" in data else os.pwrite(descriptor, data, 0),
    )
    entry = book.open(1, launch)
    monkeypatch.undo()
    assert entry.descriptor == -1
    assert "No space left" in (run / "watchdog.log").read_text(encoding="utf-8")
    assert not list(run.glob("server-*"))
    entry.note_root(os.getpid(), os.getppid(), 0)
    entry.remove()
    book.close()
    os.close(log._descriptor or 0)


def test_what_is_recorded_of_a_living_server(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        server = watchdog.launch(["sh", "-c", f": {SECRET}; exec sleep 60"], env={"TOKEN": SECRET}, name="it")
    finally:
        os.umask(previous)
    (path,) = runs.entries(tmp_path / "state")
    processes.wait_for(
        lambda: (e := entries.read(path)) is not None and e.root is not None, 10.0, "the root is recorded"
    )
    entry = entries.read(path)
    assert entry is not None
    assert (entry.name, entry.log) == ("it", str(server.log_path))
    assert entry.root == who(server.pid)
    assert entry.keeper == who(processes.parent(server.pid))
    assert entry.file == (server.log_path.stat().st_dev, server.log_path.stat().st_ino)
    assert f"{ledger.MARK}={entry.mark}".encode() in Path(f"/proc/{server.pid}/environ").read_bytes().split(b"\0")
    for file in (tmp_path / "state").rglob("*"):
        assert stat.S_IMODE(file.stat().st_mode) == (0o700 if file.is_dir() else 0o600), file
        assert file.is_dir() or SECRET not in file.read_text(encoding="utf-8")
    assert remains.find(tmp_path / "state").is_empty
    server.stop()
    assert runs.entries(tmp_path / "state") == []


def test_who_sees_the_watchdog_die_records_the_tree(tmp_path: Path) -> None:
    watchdog = harness.Watchdog(state_dir=tmp_path / "state", crash_grace_s=8.0).start()
    server = watchdog.launch(STUBBORN, ready=harness.log_line("ready")).wait_ready(READY_S)
    (path,) = runs.entries(tmp_path / "state")
    tree = {who(pid) for pid in server.pids()}
    os.kill(watchdog.pid or 0, 9)
    processes.wait_for(lambda: (e := entries.read(path)) is not None and e.members == tree, 7.9, "the tree is recorded")
    processes.wait_gone([each.pid for each in tree], 30.0)
    with pytest.raises(harness.WatchdogDied):
        watchdog.close()
    assert not path.exists()


def test_who_sees_the_keeper_die_records_the_tree(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    server = watchdog.launch(STUBBORN, ready=harness.log_line("ready")).wait_ready(READY_S)
    (path,) = runs.entries(tmp_path / "state")
    left = {who(pid) for pid in server.pids() if pid != server.pid}
    os.kill(processes.parent(server.pid), 9)
    processes.wait_for(lambda: (e := entries.read(path)) is not None and left <= e.members, 0.9, "the tree is recorded")
    server.stop()
    assert not path.exists()


# ---- what others may have planted


def test_a_link_planted_for_the_run_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "runs").mkdir(mode=0o700)
    me = processes.identify(os.getpid())
    assert me is not None
    (tmp_path / "state" / "runs" / f"{me.pid}-{me.start_time}").symlink_to(victim)
    with (
        harness.Watchdog(state_dir=tmp_path / "state") as watchdog,
        pytest.raises(harness.SpecError, match="log directory"),
    ):
        watchdog.launch(["true"])
    assert list(victim.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "FIFO"])
def test_what_is_planted_for_a_log_is_not_written_to(
    watchdog: harness.Watchdog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    planted, victim = tmp_path / "it.log", tmp_path / "victim"
    victim.touch()
    if kind == "link":
        planted.symlink_to(victim)
    else:
        os.mkfifo(planted)
    monkeypatch.setattr(logs, "new_path", lambda *_arguments: planted)
    with pytest.raises(harness.LaunchFailed, match=r"cannot open the log file .*it\.log"):
        watchdog.launch(["echo", "hello"])
    assert victim.read_bytes() == b""


def test_what_is_planted_for_an_entry_is_not_written_to(watchdog: harness.Watchdog, tmp_path: Path) -> None:
    watchdog.launch(["true"]).wait(READY_S)
    (run,) = runs.directories(tmp_path / "state")
    victim = tmp_path / "victim"
    victim.write_text("mine", encoding="ascii")
    name = f"server-{watchdog.pid}-{who(watchdog.pid or 0).start_time}"
    for number in range(2, 9):
        (run / f"{name}-{number}.json").symlink_to(victim)
        (run / f"{name}-{number + 7}.json.new").symlink_to(victim)
    for _ in range(6):
        watchdog.launch(["true"]).wait(READY_S)
    assert victim.read_text(encoding="ascii") == "mine"
    assert any("File exists" in line for line in (run / "watchdog.log").read_text(encoding="utf-8").splitlines())
    for path in run.glob("server-*"):
        path.unlink()


# ---- the command line


def test_usage_errors_are_2_and_help_is_0(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in (
        ([], 2),
        (["no-such"], 2),
        (["sweep", "--no-such"], 2),
        (["--help"], 0),
        (["sweep", "-h"], 0),
    ):
        with pytest.raises(SystemExit) as ended:
            command_line.main(arguments)
        assert ended.value.code == code
    assert "show what dead runs have left behind" in capsys.readouterr().out


def test_a_bad_state_directory_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert command_line.main(["sweep", "--state-dir", str(tmp_path / "file")]) == 2
    assert command_line.main(["sweep", "--json", "--state-dir", str(tmp_path / "missing")]) == 2
    assert not (tmp_path / "missing").exists()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "the state directory" in shown.err
    assert "No such file" in shown.err
    assert command_line.main(["doctor", "--state-dir", str(tmp_path / "file")]) == 1
    assert "BAD  state directory: cannot make the state directory" in capsys.readouterr().out


def test_where_nothing_was_ever_launched_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HARNESS_STATE_DIR", str(tmp_path / "missing"))
    for options in ([], ["--yes"]):
        assert command_line.main(["sweep", *options]) == 0
        assert capsys.readouterr().out == "no dead run has left anything\n"
    assert not (tmp_path / "missing").exists()


def test_a_name_cannot_steer_the_terminal(
    state: Path, bystander: processes.Identity, capsys: pytest.CaptureFixture[str]
) -> None:
    record(state, members=[bystander], name="\x1b[31mred\nline")
    assert command_line.main(["sweep", "--state-dir", str(state)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "?[31mred?line" in lines[1]
    assert lines[2].startswith("python -m harness sweep --yes ends them")
    (state / "runs" / RUN / "server-\x1b[31m.json").touch()
    for command in ("sweep", "doctor"):
        assert command_line.main([command, "--state-dir", str(state)]) == 1
        assert "\x1b" not in capsys.readouterr().out


def test_the_doctor_looks_at_everything(
    state: Path, bystander: processes.Identity, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(["doctor", "--state-dir", str(state), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    whats = [each["what"] for each in found]
    assert whats[:8] == [
        *("platform", "kernel", "kill path", "RLIMIT_NOFILE", "RLIMIT_NPROC", "state directory", "file locks", "ledger")
    ]
    assert whats[8:] == [what for what in whats[8:] if what == "NVML" or what.startswith("GPU ")]
    assert whats[-1] == "GPU store"
    record(state, members=[bystander])
    assert command_line.main(["doctor", "--state-dir", str(state)]) == 1
    advice = f"python -m harness sweep --yes --state-dir {state} ends them"
    assert f"BAD  ledger: dead runs have left 1 process -> {advice}" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")
def test_the_doctor_sees_a_full_state_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", str(tmp_path / "full")]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        with (tmp_path / "full" / "filler").open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, 60 << 10)
        assert command_line.main(["doctor", "--state-dir", str(tmp_path / "full")]) == 1
        assert "BAD  state directory: " in capsys.readouterr().out
    finally:
        subprocess.run(["umount", str(tmp_path / "full")], check=True)  # noqa: S607


@pytest.mark.parametrize(("given", "is_fine"), [("off", True), ("on", True), ("", True), ("OFF", False), ("0", False)])
def test_a_wrong_word_about_cgroups_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str, *, is_fine: bool
) -> None:
    monkeypatch.setenv("HARNESS_CGROUP", given)
    assert doctor._kill_path().is_fine is is_fine
    owner = harness.Watchdog(state_dir=tmp_path / "state")
    if is_fine:
        owner.start().close()
    else:
        with pytest.raises(harness.HarnessError, match='HARNESS_CGROUP must be "on" or "off"'):
            owner.start()


def test_the_doctor_says_that_cgroups_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CGROUP", "off")
    assert doctor._kill_path().text.endswith("(HARNESS_CGROUP=off)")


# ---- several watchdogs of one test process


def test_two_watchdogs_of_one_process_have_entries_of_their_own(tmp_path: Path) -> None:
    """Each counts its servers from 1, and both write into the directory of the same run."""
    state = tmp_path / "state"
    with harness.Watchdog(state_dir=state) as first, harness.Watchdog(state_dir=state) as second:
        one, other = first.launch(["sleep", "100"]), second.launch(["sleep", "100"])
        found = [entries.read(path) for path in runs.entries(state)]
        assert {entry.root for entry in found if entry} == {who(one.pid), who(other.pid)}
        one.stop()
        (left,) = [entries.read(path) for path in runs.entries(state)]
        assert left is not None
        assert left.root == who(other.pid)
    assert runs.entries(state) == []


def test_a_sandbox_that_hides_facts_costs_the_entry_not_the_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hidden() -> str:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(ledger, "boot", hidden)
    run = tmp_path / "runs" / "7-1"
    log = Log(str(run / "watchdog.log"))
    book = ledger.Ledger(str(run), os.getppid(), log, use_cgroups=False)
    launch = Launch(
        "it",
        ["a"],
        {},
        [],
        "/",
        [],
        str(run / "it.log"),
        str(run),
        "root",
        1.0,
        None,
        None,
        [],
        None,
        "",
        is_literal=False,
    )
    entry = book.open(1, launch)
    assert "the ledger is not complete: No such file" in (run / "watchdog.log").read_text(encoding="utf-8")
    with pytest.raises(entries.Unreadable):
        entries.read(Path(entry.path))
    entry.close()
    entry.remove()
    book.close()
    os.close(log._descriptor or 0)
