"""`python -m harness gpus`, and what `doctor` says of GPUs. Most tests script the driver's stand-in."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import processes
import pytest

import harness
from harness import procfs
from harness.broker.book import Baseline, Book, Lease, Quarantine, Tenant, Waiter, Want, Who
from harness.broker.readings import Reading
from harness.broker.store import Store
from harness.watchdog import ledger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpu.machine import Machine, Standin

PROCESS = Path(__file__).with_name("store_process.py")
ROOT = PROCESS.parents[2]
MIB = 1 << 20
FIRST = "GPU-00000000-0000-4000-8000-000000000000"
SECOND = "GPU-00000001-0000-4000-8000-000000000000"
UNSEEN = "GPU-0000000f-0000-4000-8000-000000000000"
DEAD = Who(1 << 22, 1, os.stat("/proc/self/ns/pid").st_ino)
ELSEWHERE = Who(7, 1, 1)
# From the start of the interpreter to the end of a stand-in's survey, on a busy machine.
SOON_S = 20.0


def me() -> Who:
    found = procfs.stat(os.getpid())
    assert found is not None
    return Who(os.getpid(), found.start_time, DEAD.namespace)


def lease(name: str = "rank0", broker: Who | None = None, **named: Any) -> Lease:
    fields = {"id": name, "test": "test_a.py::test_b", "user": 0, "since": time.time() - 12.0, "devices": {FIRST: None}}
    return Lease(**{**fields, "name": name, "broker": broker or me(), **named})


def quarantined(uuid: str = FIRST, **named: Any) -> Book:
    entry = Quarantine("300 MiB did not come back", time.time() - 34.0, "rank0")
    baseline = Baseline(Reading(0, 80 << 30, 2, {}), 0.0)
    return Book(quarantines={uuid: entry}, baselines={uuid: baseline}, **named)


def put(state_dir: Path, book: Book) -> None:
    state_dir.mkdir(mode=0o700, exist_ok=True)
    content = json.loads(json.dumps(replace(book, boot=ledger.boot()).to_json_dict()))
    Store(str(state_dir / "gpu")).change(lambda _: (content, None), timeout_s=1.0)


def book_of(state_dir: Path) -> Book:
    return Book.from_json_dict(Store(str(state_dir / "gpu")).read())


def start_s() -> float:
    """Give how long the command takes here and now that looks at nothing."""
    began = time.monotonic()
    assert gpus("--help")[0] == 0
    return time.monotonic() - began


def gpus(*options: str) -> tuple[int, str]:
    """Run the command as people do; give its exit code and what it printed, with each time as N."""
    command = [sys.executable, "-m", "harness", "gpus", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50.0, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, re.sub(r"for \d+ s", "for N s", done.stdout + done.stderr)


def as_json(*options: str) -> tuple[int, dict[str, Any]]:
    code, text = gpus("--json", *options)
    found: dict[str, Any] = json.loads(text)
    return code, found


@pytest.fixture
def no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the state directory of a machine without a GPU."""
    # An empty file is no library, whatever is installed beside it.
    (tmp_path / "libnvidia-ml.so.1").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    state_dir = tmp_path / "state"
    monkeypatch.setenv("HARNESS_STATE_DIR", str(state_dir))
    return state_dir


# --- Without a GPU


def test_without_a_gpu_it_says_so_and_all_is_fine(no_driver: Path) -> None:
    code, text = gpus()
    assert code == 0
    assert "libnvidia-ml.so.1" in text
    assert not no_driver.exists(), "a look made something"
    code, found = as_json()
    assert code == 0
    assert found == {
        "store": str(no_driver / "gpu"),
        "nvml": found["nvml"],
        "devices": [],
        "waiters": [],
        "released": [],
        "is_fine": True,
    }


def test_without_a_gpu_the_book_is_still_shown_and_can_be_released(no_driver: Path) -> None:
    put(no_driver, quarantined(UNSEEN, leases=(lease(devices={FIRST: 2000}),)))
    code, text = gpus()
    assert code == 1
    assert f"{UNSEEN}  -     quarantined for N s: 300 MiB did not come back (lease 'rank0')" in text
    assert f"leased by 'rank0' of test_a.py::test_b (pid {os.getpid()}) for N s, 2000 MiB of it" in text
    code, text = gpus("--release", UNSEEN)
    assert code == 0
    assert f"{UNSEEN} is in quarantine no more" in text


# --- What it shows


def test_devices_are_shown_with_what_is_in_use_now_and_before(standin: Standin) -> None:
    standin.hold(FIRST, os.getpid(), 700)
    put(standin.state_dir, Book(leases=(lease(),), baselines={FIRST: Baseline(Reading(200 * MIB, 1, 2, {}), 0.0)}))
    code, text = gpus()
    assert code == 0
    holder = f"'rank0' of test_a.py::test_b (pid {os.getpid()}) for N s"
    assert text.splitlines() == [
        f"GPU  USED  TOTAL  BASELINE MiB  UUID{' ' * 36}  NAME           STATE",
        f"0    700   81920  200           {FIRST}  Stand-in H100  leased by {holder}",
        f"1    0     81920  -             {SECOND}  Stand-in H100  free",
    ]
    _, found = as_json()
    first, second = found["devices"]
    assert [first[name] for name in ("index", "used_mib", "total_mib", "baseline_mib")] == [0, 700, 81920, 200]
    assert [second[name] for name in ("index", "used_mib", "total_mib", "baseline_mib")] == [1, 0, 81920, None]
    assert [first["state"], second["state"]] == ["leased", "free"]
    (row,) = first["leases"]
    assert row["pid"] == os.getpid()
    assert 12.0 <= row["since_s"] < 12.0 + SOON_S
    assert row["is_alive"] is True


def test_a_quarantine_has_its_reason_and_time(standin: Standin) -> None:
    put(standin.state_dir, quarantined())
    code, found = as_json()
    assert code == 1
    row = found["devices"][0]
    assert row["state"] == "quarantined"
    assert row["quarantine"] == "300 MiB did not come back (lease 'rank0')"
    assert 34.0 <= row["quarantined_s"] < 34.0 + SOON_S
    assert row["baseline_mib"] == 0, "a baseline of nothing is one"


@pytest.mark.parametrize(
    ("change", "words", "state"),
    [
        ({"devices": {FIRST: 2000}}, "leased by 'rank0' .* 2000 MiB of it$", "leased"),
        ({"leaving": (FIRST,)}, "leaving: 'rank0' of", "leased"),
        ({"broker": DEAD}, "whose processes are dead$", "leased"),
        ({"broker": DEAD, "stale_since": 1.0}, "for N s, whose processes are dead$", "leased"),
        ({"broker": ELSEWHERE}, "pid 7.* in another PID namespace$", "leased"),
        ({"broker": DEAD, "tenants": (Tenant(1, "s", DEAD, (FIRST,)),)}, "pid 4194304.*are dead$", "leased"),
    ],
    ids=["share", "leaving", "dead", "stale", "elsewhere", "dead tenant"],
)
def test_what_is_known_of_a_lease_is_said(standin: Standin, change: dict[str, Any], words: str, state: str) -> None:
    put(standin.state_dir, Book(leases=(lease(**change),)))
    assert as_json()[1]["devices"][0]["state"] == state
    line = next(line for line in gpus()[1].splitlines() if FIRST in line)
    assert re.search(words, line), line


def test_a_lease_lives_while_one_of_its_keepers_does(standin: Standin) -> None:
    tenants = (Tenant(1, "s", DEAD, (FIRST,)), Tenant(2, "t", me(), (FIRST,)))
    put(standin.state_dir, Book(leases=(lease(broker=DEAD, tenants=tenants),)))
    (row,) = as_json()[1]["devices"][0]["leases"]
    assert row["is_alive"] is True
    assert row["pid"] == DEAD.pid, "the first tenant's, though another one lives"


def test_each_lease_of_a_device_has_a_line(standin: Standin) -> None:
    leases = (lease("a", devices={SECOND: 100}), lease("b", devices={SECOND: 200}))
    put(standin.state_dir, Book(leases=leases))
    *_, one, other = gpus()[1].splitlines()
    assert SECOND in one
    assert "'a' of" in one
    assert SECOND not in other
    assert other.index("leased by 'b'") == one.index("leased by 'a'")


def test_who_waits_is_shown_in_order_with_what_for(standin: Standin) -> None:
    want = Want(1, (FIRST,), 500)
    since = time.time() - 5.0
    waiters = [
        Waiter(9, "late", "late", "test_l", me(), since, want),
        Waiter(4, "early", "early", "test_e", me(), since, want),
    ]
    put(standin.state_dir, Book(leases=(lease(),), waiters=tuple(waiters), next_ticket=10))
    code, text = gpus()
    assert code == 0
    lines = text.splitlines()
    early, late = lines[lines.index("Waiting, in this order:") + 1 :]
    assert early.startswith(f"  'early' of test_e (pid {os.getpid()}) for N s: waiting for 1 of 1 GPUs with 500 MiB: ")
    assert "is held by 'rank0' of test_a.py::test_b" in early
    assert late.startswith("  'late' of test_l")
    assert "1 came earlier, the first 'early' of test_e" in late
    assert [row["name"] for row in as_json()[1]["waiters"]] == ["early", "late"]


def test_what_processes_have_chosen_themselves_does_not_steer_the_terminal(standin: Standin) -> None:
    standin.set_devices([(FIRST, "\x1b[31mred")])
    put(standin.state_dir, Book(leases=(lease(test="\x1b]0;title\x07\nGPU 7 is free"),)))
    _, text = gpus()
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "?]0;title??GPU 7 is free" in text
    assert len(text.splitlines()) == 2


def test_mig_instances_are_shown(standin: Standin) -> None:
    standin.set_devices([(FIRST, "H100"), (SECOND, "H100")], instances=[("MIG-a", FIRST), ("MIG-b", FIRST)])
    _, found = as_json()
    assert [(row["index"], row["uuid"]) for row in found["devices"]] == [(0, "MIG-a"), (0, "MIG-b"), (1, SECOND)]
    code, text = gpus("--release", "0")
    assert code == 2
    assert "'0' names 2 of the GPUs" in text


def test_a_book_of_an_earlier_boot_holds_nothing(standin: Standin) -> None:
    content = replace(quarantined(), boot="another").to_json_dict()
    standin.state_dir.mkdir(mode=0o700)
    Store(str(standin.state_dir / "gpu")).change(lambda _: (content, None), timeout_s=1.0)
    code, found = as_json()
    assert code == 0
    assert {row["state"] for row in found["devices"]} == {"free"}


# --- A driver that fails


def test_a_driver_that_hangs_on_one_device_is_reported_and_not_waited_for(standin: Standin) -> None:
    standin.fail("nvmlDeviceGetComputeRunningProcesses_v3", 0, uuid=FIRST, seconds=60.0)
    starts_s = start_s()
    began = time.monotonic()
    code, text = gpus()
    assert time.monotonic() - began < 12.0 + 3 * starts_s
    assert code == 1
    first, second = text.splitlines()[1:]
    assert "cannot be read: NVML has not answered for N s: the driver hangs" in first
    assert second.endswith("free")


def test_a_driver_that_hangs_from_the_start_is_reported_with_what_the_book_says(standin: Standin) -> None:
    standin.fail("nvmlInitWithFlags", 0, seconds=60.0)
    put(standin.state_dir, Book(leases=(lease(),)))
    starts_s = start_s()
    began = time.monotonic()
    code, text = gpus()
    assert time.monotonic() - began < 12.0 + 3 * starts_s
    assert code == 1
    assert "NVML has not answered for N s: the driver hangs" in text
    assert "leased by 'rank0'" in text


def test_a_lost_device_is_reported(standin: Standin) -> None:
    standin.fail("nvmlDeviceGetComputeRunningProcesses_v3", 15, uuid=SECOND)
    code, found = as_json()
    assert code == 1
    assert [row["fault"] for row in found["devices"]] == ["", "GPU is lost"]
    assert found["devices"][1]["used_mib"] is None


def test_a_driver_that_is_out_of_order_is_not_fine(standin: Standin) -> None:
    standin.fail("nvmlInitWithFlags", 9)
    code, text = gpus()
    assert code == 1
    assert "driver is not loaded" in text


# --- Releasing


@pytest.mark.parametrize("name", [SECOND, "GPU-00000001", "1", "all"])
def test_a_quarantine_is_lifted(standin: Standin, name: str) -> None:
    put(standin.state_dir, quarantined(SECOND, leases=(lease(),), generations={SECOND: 5}))
    assert gpus()[0] == 1
    code, text = gpus("--release", name)
    assert code == 0
    assert text.startswith(f"{SECOND} is in quarantine no more\n")
    book = book_of(standin.state_dir)
    assert book.quarantines == {}
    assert book.baselines == {}
    assert book.generation(SECOND) == 6, "a reading of before would count"
    assert [one.name for one in book.leases] == ["rank0"]


def test_only_what_is_named_is_released(standin: Standin) -> None:
    both = {FIRST: Quarantine("x", 1.0, "a"), SECOND: Quarantine("y", 1.0, "b")}
    put(standin.state_dir, Book(quarantines=both))
    code, _ = gpus("--release", "1")
    assert code == 1, "the other one is still quarantined"
    assert set(book_of(standin.state_dir).quarantines) == {FIRST}
    code, found = as_json("--release", "all")
    assert code == 0
    assert found["released"] == [f"{FIRST} is in quarantine no more"]


def test_where_nothing_is_quarantined_nothing_changes(standin: Standin) -> None:
    put(standin.state_dir, Book(leases=(lease(),), next_ticket=3))
    before = book_of(standin.state_dir)
    assert gpus("--release", "all")[1].startswith("nothing is quarantined\n")
    assert gpus("--release", "1")[1].startswith(f"{SECOND} is not in quarantine\n")
    assert book_of(standin.state_dir) == before


@pytest.mark.parametrize(
    ("name", "says"), [("7", "names none of"), ("GPU-", "names 2 of"), ("GPU-ff", "names none of"), ("", "it is empty")]
)
def test_who_names_no_device_is_told_which_there_are(standin: Standin, name: str, says: str) -> None:
    put(standin.state_dir, quarantined())
    code, text = gpus("--release", name)
    assert code == 2
    assert says in text
    assert FIRST in text or not name
    assert set(book_of(standin.state_dir).quarantines) == {FIRST}


@pytest.mark.parametrize(
    ("broker", "is_ended"), [(ELSEWHERE, True), (DEAD, True), (None, False)], ids=["elsewhere", "dead", "alive"]
)
def test_a_lease_ends_that_nobody_alive_is_known_to_have(
    standin: Standin, broker: Who | None, *, is_ended: bool
) -> None:
    """Of another PID namespace it would never end else; of one who is alive it is not taken."""
    put(standin.state_dir, quarantined(leases=(lease(broker=broker, devices={FIRST: 2000, SECOND: 2000}),)))
    code, text = gpus("--release", "all")
    assert code == 0
    assert set(book_of(standin.state_dir).leases[0].devices) == {FIRST, SECOND}, "`all` is all quarantines"
    code, text = gpus("--release", FIRST)
    assert code == 0
    assert ("is given back, which was held by 'rank0'" in text) is is_ended
    assert ("stays leased: it is held by 'rank0'" in text) is not is_ended
    assert (FIRST in book_of(standin.state_dir).leases[0].devices) is not is_ended
    assert SECOND in book_of(standin.state_dir).leases[0].devices


# --- The store


@pytest.fixture
def holder(standin: Standin) -> Iterator[subprocess.Popen[str]]:
    """Give a process that has the store's lock, and is stopped."""
    put(standin.state_dir, quarantined())
    command = [sys.executable, str(PROCESS), "hold", str(standin.state_dir / "gpu")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        os.kill(process.pid, signal.SIGSTOP)
        yield process
        process.kill()


def test_a_stopped_process_that_has_the_lock_holds_up_no_look(holder: subprocess.Popen[str]) -> None:
    starts_s = start_s()
    began = time.monotonic()
    code, text = gpus()
    assert time.monotonic() - began < 3.0 + 3 * starts_s
    assert code == 1
    assert "quarantined for N s" in text
    code, text = gpus("--release", "0")
    assert code == 2
    assert f"is held by process {holder.pid}" in text


def test_a_store_in_another_form_is_an_error(standin: Standin) -> None:
    standin.state_dir.mkdir(mode=0o700)
    Store(str(standin.state_dir / "gpu")).change(lambda _: ({"leases": 3}, None), timeout_s=1.0)
    code, text = gpus()
    assert code == 2
    assert "the store of leases is not in the right form" in text


@pytest.mark.usefixtures("standin")
def test_a_shared_store_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    monkeypatch.setenv("HARNESS_GPU_DIR", str(shared))
    content = json.loads(json.dumps(replace(quarantined(), boot=ledger.boot()).to_json_dict()))
    Store(str(shared), is_shared=True).change(lambda _: (content, None), timeout_s=1.0)
    code, found = as_json()
    assert code == 1
    assert found["store"] == str(shared)
    assert gpus("--release", "0")[0] == 0
    assert {stat.S_IMODE(file.stat().st_mode) for file in shared.iterdir()} == {0o666}
    shared.rename(tmp_path / "away")
    code, text = gpus()
    assert code == 2
    assert str(shared) in text


@pytest.mark.usefixtures("standin")
def test_the_state_directory_can_be_given(tmp_path: Path) -> None:
    other = tmp_path / "other"
    put(other, quarantined())
    assert gpus()[0] == 0
    assert gpus("--state-dir", str(other))[0] == 1
    code, text = gpus("--state-dir", str(tmp_path / "none"))
    assert code == 2
    assert "none" in text
    assert not (tmp_path / "none").exists()


# --- A real lease


def test_a_servers_lease_is_shown_while_it_lasts(machine: Machine, tmp_path: Path) -> None:
    with harness.Watchdog(state_dir=tmp_path / "state") as watchdog:
        server = watchdog.launch(
            machine.server("--mib", "1000"), gpus=1, name="shown", ready=harness.http_ok("/health")
        )
        server.wait_ready(timeout_s=60.0)
        code, found = as_json("--state-dir", str(tmp_path / "state"))
        (row,) = [row for row in found["devices"] if row["uuid"] == server.gpus[0]]
        assert code == 0
        assert row["state"] == "leased"
        assert row["used_mib"] >= row["baseline_mib"] + 1000
        assert [(one["name"], one["pid"], one["is_alive"]) for one in row["leases"]] == [
            ("shown", processes.parent(server.pid), True)
        ]
        server.stop()
        _, found = as_json("--state-dir", str(tmp_path / "state"))
        assert {row["state"] for row in found["devices"]} == {"free"}


# --- doctor


def doctor() -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "harness", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, timeout=SOON_S, check=False)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return [finding for finding in found if "GPU" in finding["what"] or finding["what"] == "NVML"]


def test_doctor_finds_nothing_wrong_where_there_is_no_gpu(no_driver: Path) -> None:
    nvml, store = doctor()
    assert nvml["is_fine"]
    assert "libnvidia-ml.so.1" in nvml["text"]
    assert store["is_fine"]
    assert f"{no_driver}/gpu: 0 leases" in store["text"]


def test_doctor_says_what_each_device_tells(standin: Standin) -> None:
    standin.hold(FIRST, os.getpid(), 700)
    standin.fail("nvmlDeviceGetComputeRunningProcesses_v3", 15, uuid=SECOND)
    put(standin.state_dir, quarantined(leases=(lease(),)))
    first, second, store = doctor()
    assert first["is_fine"]
    assert first["what"] == f"GPU {FIRST}"
    assert "700 of 81920 MiB in use by 1 process" in first["text"]
    assert not second["is_fine"]
    assert "cannot be read: GPU is lost" in second["text"]
    assert not store["is_fine"]
    assert "1 lease, 0 waiting, 1 quarantined" in store["text"]
    assert "python -m harness gpus" in store["advice"]


def test_doctor_says_where_a_verdict_may_be_unknown(standin: Standin) -> None:
    standin.fail("nvmlDeviceGetComputeRunningProcesses_v3", 4)
    first, *_ = doctor()
    assert first["is_fine"]
    assert "is not told" in first["text"]


@pytest.mark.usefixtures("standin")
def test_doctor_reports_a_store_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shared"
    shared.symlink_to(tmp_path)
    monkeypatch.setenv("HARNESS_GPU_DIR", str(shared))
    *_, store = doctor()
    assert not store["is_fine"]
    assert "is a link or a file" in store["text"]
