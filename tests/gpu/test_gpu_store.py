"""The store that brokers share: what it holds survives whoever is killed, torn and planted files, and a crowd."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import processes
import pytest

from harness import procfs
from harness.broker import directory as directories
from harness.broker import slots, turns
from harness.broker import store as stores
from harness.broker.store import Store, StoreBusy, StoreError
from harness.watchdog import ledger

if TYPE_CHECKING:
    from collections.abc import Iterator

PROCESS = Path(__file__).with_name("store_process.py")
ROOT = PROCESS.parents[2]
FILES = ["book.0", "book.1", "book.lock", "book.turn"]
NOBODY = 65534


def add(content: dict[str, Any]) -> tuple[dict[str, Any], int]:
    number = content.get("number", 0) + 1
    return {**content, "number": number}, number


def put(store: Store, content: dict[str, Any]) -> None:
    store.change(lambda _: (content, None), timeout_s=1.0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "gpu"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gpu"


@pytest.fixture(params=[0o1777, 0o0777, 0o2770, 0o0770], ids=["sticky", "open", "set-group-ID", "group"])
def shared(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Give a directory outside of pytest's own, which are closed to other users."""
    with tempfile.TemporaryDirectory() as above:
        Path(above).chmod(0o755)
        found = Path(above, "shared")
        found.mkdir()
        found.chmod(request.param)
        yield found


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROCESS), *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd="/"
    )


def run(*arguments: object) -> list[str]:
    process = start(*arguments)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return text.splitlines()


@pytest.fixture
def holder(store: Store, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Give a process that has the lock."""
    put(store, {"number": 1})
    yield from held("hold", path)


@pytest.fixture
def next_one(store: Store, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Give a process that has the turn, and makes nothing of it."""
    put(store, {"number": 1})
    yield from held("turn", path)


def held(what: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    with start(what, path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


# --- What it holds


def test_there_is_nothing_at_first_and_a_look_leaves_nothing(store: Store, path: Path) -> None:
    assert store.read() == {}
    assert not path.exists()
    assert not store.has_changed()


def test_changes_are_read_by_others(store: Store, path: Path) -> None:
    assert [store.change(add, timeout_s=1.0) for _ in range(5)] == [1, 2, 3, 4, 5]
    other = Store(str(path))
    assert other.read() == {"number": 5}
    assert other.change(add, timeout_s=1.0) == 6
    assert store.read() == {"number": 6}


def test_its_files_are_its_owners_alone_and_stay(store: Store, path: Path) -> None:
    store.change(add, timeout_s=1.0)
    store.change(add, timeout_s=1.0)
    before = {name: (path / name).stat().st_ino for name in FILES}
    assert sorted(os.listdir(path)) == FILES
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert {stat.S_IMODE((path / name).stat().st_mode) for name in FILES} == {0o600}
    for _ in range(10):
        store.change(add, timeout_s=1.0)
    assert {name: (path / name).stat().st_ino for name in FILES} == before


def test_an_edit_that_raises_changes_nothing_and_lets_go(store: Store, path: Path) -> None:
    put(store, {"number": 1})
    put(store, {"number": 2})
    before = [(path / name).read_bytes() for name in FILES[:2]]

    def fail(content: dict[str, Any]) -> tuple[dict[str, Any], None]:
        content["number"] = 3
        raise OSError(28, "the edit's own")

    with pytest.raises(OSError, match="the edit's own"):
        store.change(fail, timeout_s=1.0)
    assert [(path / name).read_bytes() for name in FILES[:2]] == before
    assert store.change(add, timeout_s=0.0) == 3


def is_stopped(pid: int) -> bool:
    found = procfs.stat(pid)
    return found is not None and found.state == "T"


def age(path: Path) -> None:
    """Make both slots a second older: two writes within one tick of the clock that stamps files look like one."""
    for slot in (path / name for name in FILES[:2]):
        if slot.exists():
            stamp = slot.stat().st_mtime_ns - 10**9
            os.utime(slot, ns=(stamp, stamp))


def test_what_is_left_as_it_was_is_not_written(store: Store, path: Path) -> None:
    put(store, {"number": 1})
    put(store, {"number": 2})
    age(path)
    before = [(path / name).stat().st_mtime_ns for name in FILES[:2]]
    assert store.change(lambda content: (content, content["number"]), timeout_s=1.0) == 2
    assert [(path / name).stat().st_mtime_ns for name in FILES[:2]] == before


@pytest.mark.parametrize(
    "content", [{"set": {1}}, {"nan": float("nan")}, {"much": "x" * slots.LONGEST_BYTES}], ids=["type", "nan", "much"]
)
def test_what_cannot_be_written_is_refused(store: Store, content: dict[str, Any]) -> None:
    put(store, {"number": 1})
    with pytest.raises(StoreError, match=r"JSON"):
        put(store, content)
    assert store.read() == {"number": 1}


def test_a_full_disk_loses_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, {"number": 1})
    real = os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        if b"harness-book" in data:
            return real(descriptor, data[:10], offset)
        if offset:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StoreError, match="No space left on device"):
            put(store, {"number": 2})
    assert store.read() == {"number": 1}
    assert store.change(add, timeout_s=1.0) == 2


# --- Whether it has changed


def test_no_change_is_missed(store: Store, path: Path) -> None:
    """Many have the same size as the one before and, as the file system's clock is coarse, the same time."""
    reader = Store(str(path))
    for number in range(100, 500):
        put(store, {"number": number})
        assert reader.has_changed()
        assert reader.read() == {"number": number}


def test_once_it_is_read_it_has_not_changed(store: Store, path: Path) -> None:
    put(store, {"number": 1})
    reader = Store(str(path))
    assert reader.has_changed()
    age(path)
    reader.read()
    assert not reader.has_changed()
    put(store, {"number": 2})
    assert reader.has_changed()


def test_a_slot_that_is_being_written_is_looked_at_again(store: Store, path: Path) -> None:
    put(store, {"number": 1})
    put(store, {"number": 2})
    (path / "book.1").write_bytes((path / "book.1").read_bytes()[:-1])
    age(path)
    assert store.read() == {"number": 1}
    assert store.has_changed()


def test_what_was_read_right_after_a_write_is_not_trusted(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another write within the same tick of the file system's clock, of the same size, leaves no trace but itself."""
    put(store, {"number": 1})
    written_s = (path / "book.0").stat().st_mtime
    for after_s, is_too_early in ((0.001, True), (0.03, True), (0.2, False)):
        monkeypatch.setattr(time, "time", lambda after_s=after_s: written_s + after_s)
        store.read()
        assert store.has_changed() is is_too_early


def test_writers_may_be_faster_than_a_reader(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it looks at one slot the other is written, and then the first: it finds both torn, and looks again."""
    put(store, {"number": 1})
    put(store, {"number": 2})
    real = stores._read_slot
    torn = [True] * 8

    def read(*arguments: Any) -> tuple[bytes, tuple[int, ...]]:
        raw, stamp = real(*arguments)
        return (raw[:-1] + b"?" * torn.pop(), stamp) if torn else (raw, stamp)

    monkeypatch.setattr(stores, "_read_slot", read)
    assert store.read() == {"number": 2}
    assert not torn


# --- Torn slots


def test_torn_slots_of_every_length_are_ignored(store: Store, path: Path) -> None:
    """The slot that would be written next holds something longer, and so the end of that."""
    put(store, {"number": 1, "old": "y" * 300})
    put(store, {"number": 2})
    old = (path / "book.0").read_bytes()
    new = slots.encode(3, ledger.boot(), slots.to_text({"number": 3, "filler": "x" * 100}))
    assert len(new) < len(old)
    for length in range(len(new)):
        for torn in (new[:length], new[:length] + old[length:]):
            (path / "book.0").write_bytes(torn)
            assert store.read() == {"number": 2}, f"{length} bytes written"
    (path / "book.0").write_bytes(new + old[len(new) :])
    assert store.read()["number"] == 3


def test_a_torn_slot_is_written_next(store: Store, path: Path) -> None:
    put(store, {"number": 1})
    put(store, {"number": 2})
    (path / "book.0").write_bytes(b"torn" * 50)
    assert store.change(add, timeout_s=1.0) == 3
    (path / "book.1").write_bytes(b"torn" * 50)
    assert store.read() == {"number": 3}


def test_the_first_write_of_all_may_be_torn_at_every_length(store: Store, path: Path) -> None:
    put(store, {"number": 1})
    whole = (path / "book.0").read_bytes()
    for length in range(len(whole)):
        (path / "book.0").write_bytes(whole[:length])
        assert store.read() == {}
    assert store.change(add, timeout_s=1.0) == 1


@pytest.mark.parametrize("torn", [b"", b"\0" * 500, b"garbage" * 100], ids=["empty", "zeros", "garbage"])
def test_two_broken_slots_are_an_error_that_says_what_to_do(store: Store, path: Path, torn: bytes) -> None:
    put(store, {"number": 1})
    put(store, {"number": 2})
    put(store, {"number": 3})
    whole = (path / "book.0").read_bytes()
    (path / "book.1").write_bytes(torn)
    (path / "book.0").write_bytes(whole[:-1] + b"?")
    for use in (store.read, lambda: store.change(add, timeout_s=1.0)):
        with pytest.raises(StoreError) as error:
            use()
        for word in (str(path / "book.0"), "book.1", "leased", "remove both files"):
            assert word in str(error.value)
    (path / "book.0").unlink()
    (path / "book.1").unlink()
    assert store.change(add, timeout_s=1.0) == 1


def test_two_slots_that_broke_before_this_boot_hold_nothing_that_counts(store: Store, path: Path) -> None:
    """A power failure tears both: nothing is flushed to the disk."""
    path.mkdir(mode=0o700)
    for sequence in (8, 9):
        whole = slots.encode(sequence, "0" * 36, slots.to_text({"number": sequence}))
        (path / f"book.{sequence % 2}").write_bytes(whole[:-1] + b"?")
        (path / f"book.{sequence % 2}").chmod(0o600)
    assert store.read() == {}
    assert store.change(add, timeout_s=1.0) == 1
    assert store.read() == {"number": 1}


@pytest.mark.parametrize(
    "text", [b"[1]", b"1", b"{", b"[" * 100_000, b"\xff"], ids=["list", "int", "half", "deep", "byte"]
)
def test_what_is_whole_but_no_object_is_not_taken_for_one(text: bytes) -> None:
    assert slots.decode(slots.encode(1, "boot", text), "boot") == slots.Slot(is_lost=True)


# --- SIGKILL


@pytest.mark.parametrize("directory", ["own", "shared"])
@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_a_writer_that_is_killed_between_any_two_steps(tmp_path: Path, before: int, directory: str) -> None:
    """It leaves the old content or the new; and in the middle of a write, of which half is done."""
    lines = [line.split() for line in run("die", before, tmp_path, directory)]
    assert len(lines) > 25
    assert {"pwrite", "flock", "open", "close"} <= {name for _, name, _ in lines}
    assert lines[-1][1:] == ["none", "0"], "it has not come to its end"
    seen = []
    for step, *_ in lines:
        store = Store(str(tmp_path / step), is_shared=directory == "shared")
        seen.append(store.read().get("number", 0))
        modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / step).glob("*")}
        assert modes <= {0o666 if directory == "shared" else 0o600}, f"step {step}: others cannot open its files"
        assert store.change(add, timeout_s=0.0) == seen[-1] + 1, "it has left the lock behind"
    assert seen == sorted(seen)
    assert set(seen) == {before, before + 1}
    assert seen[-1] == before + 1


# --- The lock


def test_the_lock_of_a_killed_holder_is_free(store: Store, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    assert store.change(add, timeout_s=30.0) == 2


def test_a_stopped_holder_is_named_in_time_and_waited_for(store: Store, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGSTOP)
    processes.wait_for(lambda: is_stopped(holder.pid), 5.0, "it is stopped")
    began = time.monotonic()
    with pytest.raises(StoreBusy) as error:
        store.change(add, timeout_s=3.0)
    assert 3.0 <= time.monotonic() - began < 8.0
    for word in (f"process {holder.pid} ", "which is stopped", "book.lock"):
        assert word in str(error.value)
    assert store.read() == {"number": 1}, "readers wait for nobody"
    holder.kill()
    assert store.change(add, timeout_s=30.0) == 2


def test_a_holder_that_has_not_signed_is_not_guessed(store: Store, holder: subprocess.Popen[str], path: Path) -> None:
    """It is stopped before its first step; whoever signed before has ended."""
    (path / "book.lock").write_bytes(f"{NOBODY} 1 {ledger.namespace()} 0.0".ljust(95).encode() + b"\n")
    with pytest.raises(StoreBusy, match=r"has not said who it is \(before, by process 65534, which has ended\)"):
        store.change(add, timeout_s=0.0)
    (path / "book.lock").write_bytes(b"")
    with pytest.raises(StoreBusy, match="has not said who it is"):
        store.change(add, timeout_s=0.0)
    (path / "book.lock").write_bytes(f"{holder.pid} 1 pid:[1] 0.0".ljust(95).encode() + b"\n")
    with pytest.raises(StoreBusy, match=f"process {holder.pid} of another PID namespace"):
        store.change(add, timeout_s=0.0)


def test_one_whose_turn_it_is_and_who_does_not_move_is_passed(store: Store, next_one: subprocess.Popen[str]) -> None:
    os.kill(next_one.pid, signal.SIGSTOP)
    began = time.monotonic()
    assert store.change(add, timeout_s=60.0) == 2
    assert time.monotonic() - began < 6.0
    assert store.change(add, timeout_s=0.0) == 3, "who has no time to wait asks once in any case"


def test_a_lock_file_that_a_cleaner_removed_is_not_the_lock_any_more(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that lock two files would both have the lock."""
    put(store, {"number": 1})
    real = turns._try
    locked: list[int] = []

    def remove_first(descriptor: int) -> bool:
        if not locked:
            (path / "book.lock").unlink()
        locked.append(os.fstat(descriptor).st_ino)
        return real(descriptor)

    monkeypatch.setattr(turns, "_try", remove_first)
    assert store.change(add, timeout_s=1.0) == 2
    assert locked[-1] == (path / "book.lock").stat().st_ino


def test_a_file_system_without_locks_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> bool:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(turns, "_try", fail)
    with pytest.raises(StoreError, match="Function not implemented"):
        store.change(add, timeout_s=1.0)


# --- What others may have planted


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["link", "fifo", "socket", "directory", "hard link", "mode"])
def test_planted_files_are_refused_without_waiting(store: Store, path: Path, name: str, kind: str) -> None:
    put(store, {"number": 1})
    put(store, {"number": 2})
    victim = path.parent / "victim"
    victim.write_text("as it was")
    victim.chmod(0o600)
    file = path / name
    file.unlink()
    plant(file, kind, victim)
    began = time.monotonic()
    with pytest.raises(StoreError, match=f"{name} .*(remove it|Is a directory)"):
        store.change(add, timeout_s=60.0)
    if name in FILES[:2]:
        with pytest.raises(StoreError, match=name):
            store.read()
    assert time.monotonic() - began < 12.0
    assert victim.read_text() == "as it was"


def plant(file: Path, kind: str, victim: Path) -> None:
    if kind == "link":
        file.symlink_to(victim)
    elif kind == "hard link":
        file.hardlink_to(victim)
    elif kind == "fifo":
        os.mkfifo(file, 0o600)
    elif kind == "directory":
        file.mkdir(0o700)
    elif kind == "mode":
        file.touch()
        file.chmod(0o620)
    else:
        with socket.socket(socket.AF_UNIX) as planted:
            planted.bind(str(file))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", [*FILES, ""])
def test_another_users_file_or_directory_is_refused(store: Store, path: Path, name: str) -> None:
    put(store, {"number": 1})
    put(store, {"number": 2})
    os.chown(path / name, NOBODY, NOBODY)
    with pytest.raises(StoreError, match="belongs to user 65534"):
        store.change(add, timeout_s=1.0)


def test_a_directory_that_others_may_enter_is_refused(store: Store, path: Path) -> None:
    put(store, {"number": 1})
    path.chmod(0o750)
    for use in (store.read, lambda: store.change(add, timeout_s=1.0)):
        with pytest.raises(StoreError, match="has mode 0750"):
            use()


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_directory_that_is_a_link_or_a_file_is_refused(store: Store, path: Path, *, is_shared: bool) -> None:
    put(store, {"number": 1})
    link = path.with_name("link")
    link.symlink_to(path)
    file = path.with_name("file")
    file.touch()
    for place in (link, file):
        with pytest.raises(StoreError, match="is a link or a file"):
            Store(str(place), is_shared=is_shared).read()


def test_a_shared_directory_is_not_made(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "none"), is_shared=True)
    for use in (store.read, lambda: store.change(add, timeout_s=1.0)):
        with pytest.raises(StoreError, match=r"No such file or directory: .*none"):
            use()
    assert not (tmp_path / "none").exists()


# --- A directory of several users


def test_files_of_a_shared_directory_are_open_to_those_who_may_write_there(shared: Path) -> None:
    before = os.umask(0o077)
    try:
        put(Store(str(shared), is_shared=True), {"number": 1})
    finally:
        os.umask(before)
    others = stat.S_IMODE(shared.stat().st_mode) & 0o066
    assert {stat.S_IMODE((shared / name).stat().st_mode) for name in ["book.0", *FILES[2:]]} == {0o600 | others}


def test_where_files_cannot_be_made_at_once_their_owner_opens_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without O_TMPFILE (open(2)); whoever made the file was killed before it was open to others."""
    tmp_path.chmod(0o1777)
    monkeypatch.setattr(directories.Directory, "_make_at_once", lambda *_: False)
    store = Store(str(tmp_path), is_shared=True)
    before = os.umask(0o077)
    try:
        put(store, {"number": 1})
    finally:
        os.umask(before)
    store.change(add, timeout_s=1.0)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in FILES} == {0o666}


def test_where_it_is_another_users_a_file_is_not_opened_to_be_made(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses O_CREAT then, in a sticky directory (fs.protected_regular)."""
    store = Store(str(shared), is_shared=True)
    put(store, {"number": 1})
    put(store, {"number": 2})
    real = os.open

    def protected(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_CREAT and dir_fd is not None:
            raise PermissionError(13, "Permission denied", path)
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", protected)
    assert store.change(add, timeout_s=1.0) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become two users")
def test_two_users_share_a_directory(shared: Path) -> None:
    mode = stat.S_IMODE(shared.stat().st_mode)
    os.chown(shared, -1, NOBODY)
    shared.chmod(mode)
    store = Store(str(shared), is_shared=True)
    assert run("add", shared, NOBODY) == ["1"]
    assert store.change(add, timeout_s=1.0) == 2
    assert run("add", shared, NOBODY) == ["3"]
    assert store.change(add, timeout_s=1.0) == 4
    assert store.read()["number"] == 4
    assert {(shared / name).stat().st_uid for name in FILES} == {0, NOBODY}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become two users")
def test_a_user_who_has_no_part_in_it_is_told(shared: Path) -> None:
    shared.chmod(0o755)
    put(Store(str(shared), is_shared=True), {"number": 1})
    (line,) = run("add", shared, NOBODY)
    assert "Permission denied" in line
    assert "book.lock" in line


# --- A crowd


def crowd(path: Path, processes: int, seconds: float, hold_s: float) -> Iterator[dict[str, Any]]:
    """Have processes change a store; gives nothing while they do, and then what they say."""
    path.mkdir(mode=0o700, exist_ok=True)
    arguments = ["store", str(path), str(processes), str(seconds), str(hold_s)]
    command = [sys.executable, "-m", "tools.benchmarks.case_handoff", *arguments]
    said = path.with_name("said")
    with said.open("w") as file, subprocess.Popen(command, stdout=file, cwd=ROOT) as process:
        while process.poll() is None:
            yield {}
    yield json.loads(said.read_text())


def test_a_crowd_loses_nothing_and_nobody_is_starved(store: Store, path: Path) -> None:
    """Sixteen change it for six seconds, as fast as they can; meanwhile it is read."""
    reads = [0]
    said: list[dict[str, Any]] = []
    for found in crowd(path, 16, 6.0, 0.0):
        said = [found]
        reads.append(sum(store.read().get("counts", {}).values()))
        time.sleep(0.003)  # a reader that never rests would take one of two cores from the sixteen
    counts = said[0]["counts"]
    assert reads == sorted(reads), "a reader saw something older after something newer"
    assert len(set(reads)) > 20
    assert sum(counts) > 160, "the machine was too busy to tell anything"
    assert [said[0]["content"]["counts"][str(number)] for number in range(16)] == counts, "an update was lost"
    assert min(counts) >= sum(counts) / 16 / 2, f"somebody was starved: {counts}"


def test_who_lets_go_does_not_overtake_who_waits(path: Path) -> None:
    """Without turns, one of four that hold the lock for 20 ms has it some ten times before another gets it."""
    *_, said = crowd(path, 4, 5.0, 0.02)
    assert sum(said["counts"]) > 40, "the machine was too busy to tell anything"
    assert len(said["handoffs_s"]) >= 0.8 * sum(said["counts"])
