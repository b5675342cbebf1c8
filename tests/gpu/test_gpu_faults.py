"""Leases when processes of ours are killed or stopped, when the driver hangs, and when memory does not come back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import processes
import pytest

import harness
from harness import leasing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gpu.machine import Machine, Standin

MIB = 3000
SOON_S = 20.0
SERVERS = Path(__file__).parents[1] / "servers"
_LOST = 15
_DRIVER_NOT_LOADED = 9
_HOLDER = """
import json, signal, sys
import harness
watchdog = harness.Watchdog(crash_grace_s=0.5).start()
server = watchdog.launch(json.loads(sys.argv[1]), gpus=[sys.argv[2]], ready=harness.http_ok("/health"), name="held")
server.wait_ready(timeout_s=30)
print(json.dumps([watchdog.pid, server.pid]), flush=True)
signal.pause()
"""


class Holder:
    """A test process that has a server on a device, and everybody below it."""

    def __init__(self, machine: Machine, device: str, *options: str) -> None:
        command = [sys.executable, "-c", _HOLDER, json.dumps(machine.server("--mib", str(MIB), *options)), device]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        assert self.process.stdout is not None
        watchdog, server = json.loads(self.process.stdout.readline())
        below = processes.tree(watchdog)
        (broker,) = [pid for pid in below if processes.name(pid) == "harness-broker"]
        keeper = processes.parent(server)
        self.pids = {"client": self.process.pid, "watchdog": watchdog, "broker": broker, "keeper": keeper}
        self.server = processes.identities([server, *processes.tree(server)])
        self.everybody = processes.identities([self.process.pid, watchdog, *below])

    def signal(self, number: int, *names: str) -> None:
        for name in names:
            os.kill(self.pids[name], number)

    def end(self) -> None:
        assert self.process.stdout is not None
        self.process.stdout.close()
        for who in self.everybody:
            if processes.is_running(who):
                os.kill(who.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def hold(machine: Machine) -> Iterator[Callable[..., Holder]]:
    """Give a function that starts a test process with a server on a device."""
    holders: list[Holder] = []

    def start(device: str, *options: str) -> Holder:
        holders.append(Holder(machine, device, *options))
        return holders[-1]

    yield start
    for holder in holders:
        holder.end()


def next_one(
    machine: Machine, device: str, *, gpu_wait_s: float = SOON_S, gpu_release_s: float = SOON_S
) -> harness.Watchdog:
    """Give the watchdog of the next run, with a server on this device."""
    options = {"crash_grace_s": 0.5, "gpu_wait_s": gpu_wait_s, "gpu_release_s": gpu_release_s}
    owner = harness.Watchdog(state_dir=machine.state_dir, log_dir=None, **options).start()
    try:
        owner.launch(machine.server("--mib", str(MIB)), gpus=[device], ready=harness.http_ok("/health"), name="next")
    except BaseException:
        owner.close()
        raise
    return owner


KILLED = [
    ("client",),
    ("watchdog",),
    ("client", "watchdog"),
    ("client", "broker"),
    ("watchdog", "broker"),
    ("client", "watchdog", "broker"),
    ("broker", "keeper"),
    ("keeper",),
    ("client", "watchdog", "broker", "keeper"),
]


@pytest.mark.parametrize("killed", KILLED, ids="+".join)
def test_whoever_is_killed_the_device_is_given_on_when_its_memory_is_back(
    machine: Machine, hold: Callable[..., Holder], killed: tuple[str, ...]
) -> None:
    device = machine.uuids[0]
    holder = hold(device, "--on-term", "ignore")
    holder.signal(signal.SIGSTOP, *killed)
    holder.signal(signal.SIGKILL, *killed)
    with next_one(machine, device, gpu_wait_s=SOON_S) as owner:
        assert not [who for who in holder.server if processes.is_running(who)], "it was given on while it was held"
        report = owner.stop(owner.servers)
    assert report.gpu is not None
    assert report.gpu.verdict == "freed"
    holder.end()
    assert machine.book(machine.state_dir)["quarantines"] == {}


def test_a_broker_that_is_killed_does_not_give_the_device_of_a_running_server_away(
    machine: Machine, hold: Callable[..., Holder]
) -> None:
    device = machine.uuids[0]
    holder = hold(device)
    holder.signal(signal.SIGKILL, "broker")
    with pytest.raises(harness.GpuUnavailable, match="is held by 'held'"):
        next_one(machine, device, gpu_wait_s=3.0)
    assert all(map(processes.is_running, holder.server))
    holder.signal(signal.SIGKILL, "client")
    next_one(machine, device, gpu_wait_s=SOON_S).close()


def test_memory_that_comes_back_late_after_a_crash_is_waited_for(standin: Standin, hold: Callable[..., Holder]) -> None:
    device = standin.uuids[0]
    holder = hold(device, "--linger-ms", "1500")
    holder.signal(signal.SIGKILL, "client", "watchdog", "broker")
    processes.wait_gone(holder.server, 5.0)
    began = time.monotonic()
    with next_one(standin, device, gpu_wait_s=SOON_S):
        assert time.monotonic() - began > 1.0


def test_memory_that_does_not_come_back_after_a_crash_is_quarantined_until_it_does(
    standin: Standin, hold: Callable[..., Holder]
) -> None:
    device, other = standin.uuids
    holder = hold(device)
    standin.set_residue(device, 2000)
    holder.signal(signal.SIGKILL, "client", "watchdog", "broker")
    with pytest.raises(harness.GpuUnavailable, match=r"is quarantined: \d+ MiB did not come back from 'held'"):
        next_one(standin, device, gpu_wait_s=SOON_S, gpu_release_s=0.5)
    next_one(standin, other, gpu_wait_s=SOON_S).close()
    standin.set_residue(device, 0)
    with harness.Watchdog(state_dir=standin.state_dir) as owner:
        servers = [owner.launch(standin.server(), gpus=2)]
        assert set(servers[0].gpus) == {device, other}


def test_a_stopped_broker_at_the_head_of_the_queue_holds_up_nobody(
    machine: Machine, hold: Callable[..., Holder]
) -> None:
    device = machine.uuids[0]
    first = hold(device)
    with harness.Watchdog(state_dir=machine.state_dir, crash_grace_s=0.5) as second:
        thread = threading.Thread(target=_launch_quietly, args=(second, machine, device))
        thread.start()
        processes.wait_for(lambda: len(machine.book(machine.state_dir)["waiters"]) == 1, SOON_S, "it waits")
        (broker,) = [pid for pid in processes.tree(second.pid or 0) if processes.name(pid) == "harness-broker"]
        os.kill(broker, signal.SIGSTOP)
        first.signal(signal.SIGKILL, "client")
        next_one(machine, device, gpu_wait_s=SOON_S).close()
        os.kill(broker, signal.SIGCONT)
        thread.join(SOON_S)
        assert second.servers, "it has its turn after all"


def _launch_quietly(owner: harness.Watchdog, machine: Machine, device: str) -> None:
    owner.launch(machine.server(), gpus=[device])


_DAEMON = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import gpu_server
devices = gpu_server.StandinDevices(0, is_listed=False)
devices.hold(100, 0)
time.sleep(0.5)  # a probe that the broker sees
devices.free()
if os.fork() == 0:
    time.sleep(600)  # until it is killed: it may take memory at any time
"""


def test_the_device_of_a_daemon_is_not_handed_over_when_its_root_exits(standin: Standin) -> None:
    device = standin.uuids[0]
    command = [sys.executable, "-c", _DAEMON, str(SERVERS)]
    with harness.Watchdog(state_dir=standin.state_dir, crash_grace_s=0.5) as owner:
        server = owner.launch(command, gpus=[device], name="daemon")
        processes.wait_for(lambda: server.state == "detached", SOON_S, "its root has exited")
        with pytest.raises(harness.GpuUnavailable, match="is held by 'daemon'"):
            next_one(standin, device, gpu_wait_s=3.0)
        assert row_of(owner.stop([server])).verdict == "freed"
        next_one(standin, device).close()


def test_a_leak_of_one_server_of_a_group_does_not_give_the_others_device_away(standin: Standin) -> None:
    device = standin.uuids[0]
    owner = harness.Watchdog(state_dir=standin.state_dir, crash_grace_s=0.5, gpu_release_s=0.5).start()
    group = owner.group("dp", gpus=[device])
    leaks = launch(group, standin, "--linger-ms", "1500", name="leaks", gpus=None)
    launch(group, standin, name="runs", gpus=None)
    assert leaks.stop().gpu[0].verdict == "held"
    with pytest.raises(harness.GpuUnavailable, match="is not on its lease"):
        launch(group, standin, name="late", gpus=None)
    processes.wait_for(lambda: standin.used_mib(device) == MIB, SOON_S, "what leaked has come back late")
    with pytest.raises(harness.GpuUnavailable, match="is held by 'dp'"):
        next_one(standin, device, gpu_wait_s=3.0)
    report = group.stop()
    assert [row.verdict for row in report.outcomes[1].gpu] == ["freed"]
    owner.close()
    next_one(standin, device).close()


def test_a_broker_that_is_stopped_does_not_keep_a_launch_for_good(
    machine: Machine, hold: Callable[..., Holder]
) -> None:
    device = machine.uuids[0]
    hold(device)
    with harness.Watchdog(state_dir=machine.state_dir, crash_grace_s=0.5, gpu_wait_s=5.0) as second:
        failures: list[BaseException] = []
        thread = threading.Thread(target=_launch_and_fail, args=(second, machine, device, failures))
        thread.start()
        processes.wait_for(lambda: len(machine.book(machine.state_dir)["waiters"]) == 1, SOON_S, "it waits")
        (broker,) = [pid for pid in processes.tree(second.pid or 0) if processes.name(pid) == "harness-broker"]
        os.kill(broker, signal.SIGSTOP)
        thread.join(SOON_S)
        assert [type(failure) for failure in failures] == [harness.GpuUnavailable]
        processes.wait_gone(processes.identities([broker]), 5.0)
        assert "does not answer" in str(failures[0])


def _launch_and_fail(owner: harness.Watchdog, machine: Machine, device: str, failures: list[BaseException]) -> None:
    try:
        owner.launch(machine.server(), gpus=[device])
    except harness.HarnessError as error:
        failures.append(error)


# ---- memory that is held, and a driver that fails


@pytest.fixture
def watchdog(standin: Standin) -> Iterator[harness.Watchdog]:
    """Give a watchdog that waits for memory for 1 s only."""
    owner = harness.Watchdog(state_dir=standin.state_dir, crash_grace_s=0.5, gpu_release_s=1.0).start()
    yield owner
    owner.close()  # what is held is each test's own affair


def launch(
    owner: harness.Watchdog | harness.ServerGroup, standin: Standin, *options: str, **named: object
) -> harness.Server:
    arguments = {"gpus": [standin.uuids[0]], "ready": harness.http_ok("/health"), "grace_s": 5.0, **named}
    return owner.launch(standin.server("--mib", str(MIB), *options), **arguments).wait_ready(SOON_S)  # type: ignore[arg-type]


def row_of(report: harness.StopReport) -> harness.DeviceRelease:
    assert report.gpu is not None
    (row,) = report.gpu.devices
    return row


def test_memory_that_is_held_is_said_to_be_and_its_device_is_given_to_nobody(
    standin: Standin, watchdog: harness.Watchdog
) -> None:
    device, other = standin.uuids
    server = launch(watchdog, standin, "--linger-ms", "60000", "--listed")
    report = watchdog.stop([server])
    row = row_of(report)
    assert (row.verdict, [process.pid for process in row.own]) == ("held", [server.pid])
    assert row.own[0].used_mib == MIB
    assert "gpu_server.py" in row.own[0].command
    assert (row.baseline_mib, row.now_mib) == (0, MIB)
    assert not report.is_clean
    with pytest.raises(harness.GpuNotReleased, match=f"pid {server.pid}, {MIB} MiB: "):
        report.raise_if_leaked()
    with pytest.raises(harness.GpuUnavailable, match=f"{device} is quarantined: {MIB} MiB did not come back"):
        launch(watchdog, standin)
    assert launch(watchdog, standin, gpus=1).gpus == (other,)


@pytest.mark.parametrize("is_listed", [True, False])
def test_the_quarantine_tells_what_is_held_and_not_what_strangers_have(
    standin: Standin,
    watchdog: harness.Watchdog,
    stranger: Callable[[str, int], subprocess.Popen[bytes]],
    *,
    is_listed: bool,
) -> None:
    device = standin.uuids[0]
    leaves = stranger(device, 2 * MIB)
    server = launch(watchdog, standin, "--linger-ms", "60000", *(["--listed"] if is_listed else []))
    leaves.kill()
    leaves.wait()
    stranger(device, MIB // 2)
    assert row_of(watchdog.stop([server])).verdict == "held"
    with pytest.raises(harness.GpuUnavailable, match=f"{device} is quarantined: {MIB} MiB did not come back"):
        launch(watchdog, standin)


def test_memory_that_no_listed_process_holds_is_held(standin: Standin, watchdog: harness.Watchdog) -> None:
    server = launch(watchdog, standin)
    standin.set_residue(standin.uuids[0], 2000)
    row = row_of(watchdog.stop([server]))
    assert (row.verdict, row.own, row.now_mib) == ("held", (), 2000)
    assert row.note == "no process that is listed, and lives, holds it"


def test_a_stranger_who_frees_meanwhile_hides_no_leak(
    standin: Standin, watchdog: harness.Watchdog, stranger: Callable[[str, int], subprocess.Popen[bytes]]
) -> None:
    other = stranger(standin.uuids[0], 2 * MIB)
    server = launch(watchdog, standin, "--linger-ms", "60000")
    other.kill()
    other.wait()
    row = row_of(watchdog.stop([server]))
    assert (row.baseline_mib, row.now_mib) == (2 * MIB, MIB)
    assert row.verdict == "held"


def test_where_no_process_is_listed_totals_decide_and_that_is_said(
    standin: Standin, watchdog: harness.Watchdog
) -> None:
    standin.mark("blind")
    row = row_of(watchdog.stop([launch(watchdog, standin)]))
    assert row.verdict == "freed"
    assert "total" in row.note
    server = launch(watchdog, standin)
    standin.set_residue(standin.uuids[0], 2000)
    row = row_of(watchdog.stop([server]))
    assert row.verdict == "held"
    assert "cannot be told whose" in row.note


def test_where_totals_cannot_tell_nothing_is_said_to_be_free(
    standin: Standin, watchdog: harness.Watchdog, stranger: Callable[[str, int], subprocess.Popen[bytes]]
) -> None:
    standin.mark("untold")
    server = launch(watchdog, standin)
    stranger(standin.uuids[0], 2 * MIB)
    report = watchdog.stop([server])
    row = row_of(report)
    assert row.verdict == "unknown"
    assert "others have come meanwhile" in row.note
    report.raise_if_leaked()
    assert launch(watchdog, standin).gpus == (standin.uuids[0],), "it is not quarantined for that"


def test_a_driver_that_hangs_delays_no_signal_and_no_reply(standin: Standin, watchdog: harness.Watchdog) -> None:
    device, other = standin.uuids
    server = launch(watchdog, standin)
    beside = launch(watchdog, standin, gpus=[other])
    standin.fail("nvmlDeviceGetMemoryInfo_v2", 0, uuid=device, seconds=60.0)
    root = processes.identities([server.pid])
    reports: list[harness.StopReport] = []
    thread = threading.Thread(target=lambda: reports.append(watchdog.stop([server])))
    thread.start()
    processes.wait_gone(root, 8.0)
    began = time.monotonic()
    assert beside.state == "running"
    assert row_of(watchdog.stop([beside])).verdict == "freed"
    assert launch(watchdog, standin, gpus=1).gpus == (other,)
    assert time.monotonic() - began < 9.0  # a broker that is asked has 10 s to answer
    thread.join(SOON_S)
    standin.mend("nvmlDeviceGetMemoryInfo_v2", device)
    row = row_of(reports[0])
    assert row.verdict == "unknown"
    assert "NVML has not answered" in row.note


def test_a_lost_device_is_reported_and_not_waited_for(standin: Standin, watchdog: harness.Watchdog) -> None:
    device, other = standin.uuids
    server = launch(watchdog, standin)
    standin.fail("nvmlDeviceGetMemoryInfo_v2", _LOST, uuid=device)
    began = time.monotonic()
    row = row_of(watchdog.stop([server]))
    assert (row.verdict, row.note, row.now_mib) == ("unknown", "GPU is lost", None)
    assert launch(watchdog, standin, gpus=1).gpus == (other,)
    with pytest.raises(harness.GpuUnavailable, match=f"{device} is (lost|quarantined): .*GPU is lost"):
        launch(watchdog, standin)
    assert time.monotonic() - began < 9.0


def test_a_device_that_is_lost_before_is_given_to_nobody(standin: Standin, watchdog: harness.Watchdog) -> None:
    standin.fail("nvmlDeviceGetMemoryInfo_v2", _LOST, uuid=standin.uuids[0])
    assert launch(watchdog, standin, gpus=1).gpus == (standin.uuids[1],)
    with pytest.raises(harness.GpuUnavailable, match="is lost: GPU is lost"):
        launch(watchdog, standin)


def test_a_fault_that_passes_is_not_noticed(standin: Standin, watchdog: harness.Watchdog) -> None:
    server = launch(watchdog, standin)
    standin.fail("nvmlDeviceGetMemoryInfo_v2", 999, count=3)
    standin.fail("nvmlDeviceGetComputeRunningProcesses_v3", 10, count=2)
    assert row_of(watchdog.stop([server])).verdict == "freed"


def test_without_a_driver_there_is_no_gpu(
    standin: Standin, watchdog: harness.Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin.fail("nvmlInitWithFlags", _DRIVER_NOT_LOADED)
    with pytest.raises(harness.GpuUnavailable, match="driver is not loaded: try nvidia-smi") as caught:
        launch(watchdog, standin, gpus=1)
    assert not caught.value.is_absent
    monkeypatch.delenv("LD_LIBRARY_PATH")
    with harness.Watchdog() as other, pytest.raises(harness.GpuUnavailable, match=r"libnvidia-ml\.so\.1") as caught:
        launch(other, standin, gpus=1)
    assert caught.value.is_absent


def test_mig_instances_are_leased_in_place_of_their_gpu(standin: Standin, watchdog: harness.Watchdog) -> None:
    parent = standin.uuids[0]
    instances = [f"MIG-{number:08x}-0000-4000-8000-000000000000" for number in range(2)]
    standin.set_devices([(parent, "Stand-in H100")], instances=[(uuid, parent) for uuid in instances])
    servers = [launch(watchdog, standin, gpus=1, name=f"mig{number}") for number in range(2)]
    assert [server.gpus for server in servers] == [(uuid,) for uuid in instances]
    report = watchdog.stop(servers)
    assert report.gpu is not None
    assert report.gpu.verdict == "freed"


def test_an_old_driver_without_the_second_form_is_read_all_the_same(
    standin: Standin, watchdog: harness.Watchdog
) -> None:
    for function in ("MemoryInfo_v2", "ComputeRunningProcesses_v3", "MPSComputeRunningProcesses_v3"):
        standin.mark(f"missing.nvmlDeviceGet{function}")
    row = row_of(watchdog.stop([launch(watchdog, standin)]))
    assert (row.verdict, row.baseline_mib) == ("freed", 480), "the first form counts the driver's reserve"


def test_a_broker_that_can_write_nothing_down_does_not_outlive_its_run(
    machine: Machine, hold: Callable[..., Holder]
) -> None:
    holder = hold(machine.uuids[0])
    lock = machine.state_dir / "gpu" / "book.lock"
    lock.unlink()
    lock.mkdir()
    holder.signal(signal.SIGKILL, "client")
    processes.wait_gone(holder.everybody, 12.0)
    lock.rmdir()
    next_one(machine, machine.uuids[0]).close()


@pytest.mark.parametrize("wrong", [{"count": 99}, {"count": -1}, {"memory_mib": 0}, {"memory_mib": -5}])
def test_a_request_that_no_client_of_ours_makes_harms_nobody(
    standin: Standin, watchdog: harness.Watchdog, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, int]
) -> None:
    right = leasing._request
    with monkeypatch.context() as patched:
        patched.setattr(leasing, "_request", lambda *given, **named: right(*given, **named).replaced(**wrong))
        with pytest.raises(harness.GpuUnavailable, match=r"not in the right form|GPUs are wanted"):
            watchdog.launch(standin.server(), gpus=1, gpu_memory_mib=100)
    assert launch(watchdog, standin).gpus == (standin.uuids[0],)


def test_a_store_that_somebody_holds_fails_the_launch_and_nothing_else(standin: Standin, tmp_path: Path) -> None:
    (tmp_path / "state" / "gpu").mkdir(parents=True, mode=0o700)
    (tmp_path / "state").chmod(0o700)
    os.mkfifo(tmp_path / "state" / "gpu" / "book.0")
    with harness.Watchdog(state_dir=standin.state_dir, crash_grace_s=0.5) as owner:
        with pytest.raises(harness.GpuUnavailable, match="store"):
            launch(owner, standin)
        owner.launch(["sleep", "60"]).stop()
