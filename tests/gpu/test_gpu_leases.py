"""Leases and verdicts, end to end: real watchdogs, brokers and servers; the driver is the stand-in, or the real one."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import processes
import pytest

import harness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gpu.machine import Machine

MIB = 3000
# What the driver and a fake server need on a busy machine.
SOON_S = 20.0


@pytest.fixture
def watchdog(machine: Machine, tmp_path: Path) -> Iterator[harness.Watchdog]:
    """Give a watchdog on the machine's GPUs; at its end nothing of its tree is left, the broker included."""
    with harness.Watchdog(state_dir=tmp_path / "state", crash_grace_s=0.5, gpu_release_s=1.5) as owner:
        yield owner
        everything = processes.identities(processes.tree(owner.pid or 0))
    processes.wait_gone(everything, 2.0)
    assert machine.book(tmp_path / "state")["leases"] == []


def launched(
    owner: harness.Watchdog | harness.ServerGroup, machine: Machine, *options: str, **named: object
) -> harness.Server:
    """Launch a server that holds memory, and wait until it does."""
    arguments = {"gpus": 1, "ready": harness.http_ok("/health"), "grace_s": 5.0, **named}
    return owner.launch(machine.server(*options), **arguments).wait_ready(timeout_s=SOON_S)  # type: ignore[arg-type]


def row_of(report: harness.StopReport) -> harness.DeviceRelease:
    assert report.gpu is not None
    (row,) = report.gpu.devices
    return row


def test_a_server_sees_its_device_alone_and_its_memory_comes_back(watchdog: harness.Watchdog, machine: Machine) -> None:
    server = launched(watchdog, machine, "--mib", str(MIB))
    environment = machine.environment_of(server.pid)
    assert server.gpus == (environment["CUDA_VISIBLE_DEVICES"],)
    assert server.gpus[0] in machine.uuids
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    before = machine.used_mib(server.gpus[0])
    assert before >= MIB
    report = watchdog.stop([server])
    row = row_of(report)
    assert (row.uuid, row.verdict, row.own, row.foreign) == (server.gpus[0], "freed", (), ())
    assert row.baseline_mib is not None
    assert row.peak_mib is not None
    assert row.peak_mib - row.baseline_mib >= MIB
    assert row.freed_at is not None
    assert report.is_clean
    assert machine.used_mib(server.gpus[0]) <= row.baseline_mib + 64


def test_a_launch_waits_for_the_device_of_another(watchdog: harness.Watchdog, machine: Machine) -> None:
    first = launched(watchdog, machine, "--mib", str(MIB), gpus=len(machine.uuids))
    began: list[float] = []

    def second() -> None:
        with launched(watchdog, machine, "--mib", str(MIB)):
            began.append(time.monotonic())

    thread = threading.Thread(target=second)
    thread.start()
    thread.join(1.0)
    assert not began
    report = watchdog.stop([first])
    thread.join(SOON_S)
    assert report.gpu is not None
    assert began
    assert began[0] > max(row.freed_at or 0.0 for row in report.gpu.devices)


def test_shares_of_a_device_are_had_at_once_and_no_more_than_it_has(
    watchdog: harness.Watchdog, machine: Machine
) -> None:
    device = machine.uuids[0]
    share = machine.total_mib // 2 - 600
    servers = [
        launched(watchdog, machine, "--mib", str(MIB), gpus=[device], gpu_memory_mib=share, name=f"share{number}")
        for number in range(2)
    ]
    assert {server.gpus for server in servers} == {(device,)}
    waiting = harness.Watchdog(state_dir=machine.state_dir, gpu_wait_s=3.0)
    with waiting, pytest.raises(harness.GpuUnavailable, match="waited 3 s") as caught:
        waiting.launch(machine.server(), gpus=[device], gpu_memory_mib=share)
    assert "share0" in str(caught.value)
    first = watchdog.stop([servers[0]])
    assert row_of(first).verdict == "freed"
    assert row_of(first).foreign == (), "a neighbour is no stranger"
    assert row_of(watchdog.stop([servers[1]])).verdict == "freed"


def test_a_share_that_no_device_has_is_refused_at_once(watchdog: harness.Watchdog, machine: Machine) -> None:
    with pytest.raises(harness.GpuUnavailable):
        watchdog.launch(machine.server(), gpu_memory_mib=machine.total_mib + 1)
    with pytest.raises(harness.GpuUnavailable, match=f"{len(machine.uuids) + 1} GPUs are wanted"):
        watchdog.launch(machine.server(), gpus=len(machine.uuids) + 1)
    with pytest.raises(harness.GpuUnavailable):
        watchdog.launch(machine.server(), gpus=["GPU-no-such-device"])


def test_only_visible_devices_are_taken(
    watchdog: harness.Watchdog, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", machine.uuids[-1])
    server = launched(watchdog, machine)
    assert server.gpus == (machine.uuids[-1],)
    watchdog.stop([server])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(harness.GpuUnavailable, match="CUDA_VISIBLE_DEVICES is ''"):
        watchdog.launch(machine.server(), gpus=1)


def test_a_group_leases_all_at_once_and_each_server_has_its_share(watchdog: harness.Watchdog, machine: Machine) -> None:
    if len(machine.uuids) < 2:
        pytest.skip("this machine has one GPU")
    with watchdog.group("dp", gpus=2) as group:
        ranks = [launched(group, machine, name=f"rank{rank}", gpus=1) for rank in range(2)]
        assert len({rank.gpus for rank in ranks}) == 2
        everything = launched(group, machine, name="all", gpus=None)
        assert set(everything.gpus) == {rank.gpus[0] for rank in ranks}
        with pytest.raises(harness.SpecError, match="only 0 are not taken"):
            group.launch(machine.server(), gpus=1)
        ranks[0].stop()
        again = launched(group, machine, name="again", gpus=1)
        assert again.gpus == ranks[0].gpus
        report = group.stop()
    assert report.gpu is not None
    assert report.gpu.verdict == "freed"
    assert len(report.gpu.devices) == 5


def test_a_group_that_is_stopped_while_it_waits_for_gpus_waits_no_longer(
    watchdog: harness.Watchdog, machine: Machine
) -> None:
    everything = launched(watchdog, machine, gpus=len(machine.uuids))
    failures: list[harness.HarnessError] = []

    def launch(group: harness.ServerGroup) -> None:
        try:
            group.launch(machine.server(), gpus=1)
        except harness.HarnessError as error:
            failures.append(error)

    group = watchdog.group("waits", gpus=1)
    threads = [threading.Thread(target=launch, args=(group,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    processes.wait_for(lambda: len(machine.book(machine.state_dir)["waiters"]) == 1, SOON_S, "one waits for both")
    with group:
        pass
    for thread in threads:
        thread.join(SOON_S)
    assert len(failures) == 2
    with pytest.raises(harness.HarnessError, match="has been left"):
        group.lease_gpus()
    watchdog.stop([everything])
    launched(watchdog, machine, gpus=len(machine.uuids)).stop()


def test_a_launch_that_comes_too_late_for_its_group_keeps_no_gpu(
    watchdog: harness.Watchdog, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = watchdog.group("left", gpus=len(machine.uuids))
    reserve = group._reserve

    def reserve_and_leave(name: str | None) -> str:
        reserved = reserve(name)
        with group:
            pass
        return reserved

    monkeypatch.setattr(group, "_reserve", reserve_and_leave)
    with pytest.raises(harness.HarnessError, match="has been left"):
        group.launch(machine.server())
    launched(watchdog, machine, gpus=len(machine.uuids)).stop()


def test_a_group_may_be_used_again_after_its_stop(watchdog: harness.Watchdog, machine: Machine) -> None:
    with watchdog.group("twice", gpus=1) as group:
        for number in range(2):
            launched(group, machine, name=f"server{number}")
            group.stop()


def test_a_server_that_ends_by_itself_gives_its_device_back(watchdog: harness.Watchdog, machine: Machine) -> None:
    server = launched(watchdog, machine, gpus=len(machine.uuids))
    os.kill(server.pid, signal.SIGKILL)
    with launched(watchdog, machine):
        pass
    assert server.wait(SOON_S).gpu[0].verdict == "freed"


def test_a_launch_that_fails_gives_its_devices_back(watchdog: harness.Watchdog, machine: Machine) -> None:
    for _ in range(3):
        with pytest.raises(harness.LaunchFailed):
            watchdog.launch(["/no/such/program"], gpus=len(machine.uuids))
    with launched(watchdog, machine, gpus=len(machine.uuids)):
        pass


def test_a_launch_that_is_interrupted_before_it_gives_the_lease_back_does_not_keep_it(
    watchdog: harness.Watchdog, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.leasing.GpuLease.end", lambda _lease: None)  # whenever the interrupt came
    launched(watchdog, machine, gpus=len(machine.uuids)).stop()
    launched(watchdog, machine, gpus=len(machine.uuids)).stop()


def test_an_interrupted_wait_takes_nothing(watchdog: harness.Watchdog, machine: Machine) -> None:
    held = launched(watchdog, machine, gpus=len(machine.uuids))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            watchdog.launch(machine.server(), gpus=1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    watchdog.stop([held])
    processes.wait_for(lambda: machine.book(machine.state_dir)["waiters"] == [], SOON_S, "nobody waits")
    with launched(watchdog, machine, gpus=len(machine.uuids)):
        pass


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_cancelled_wait_of_an_async_launch_takes_nothing(
    watchdog: harness.Watchdog, machine: Machine, backend: str
) -> None:
    """Also where a second launch of the group waits for the first one's lease."""

    def one_waits() -> bool:
        return len(machine.book(machine.state_dir)["waiters"]) == 1

    async def cancel() -> None:
        group = watchdog.group("waits", gpus=1)
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(group.launch_async, machine.server())
            await anyio.to_thread.run_sync(processes.wait_for, one_waits, SOON_S, "one waits for both")
            tasks.cancel_scope.cancel()
        assert group.servers == ()

    held = launched(watchdog, machine, gpus=len(machine.uuids))
    anyio.run(cancel, backend=backend)
    watchdog.stop([held])
    processes.wait_for(lambda: machine.book(machine.state_dir)["waiters"] == [], SOON_S, "nobody waits")
    with launched(watchdog, machine, gpus=len(machine.uuids)):
        pass


def test_a_tenant_from_outside_makes_no_leak_and_hides_none(
    watchdog: harness.Watchdog, machine: Machine, stranger: Callable[..., object]
) -> None:
    server = launched(watchdog, machine, "--mib", str(MIB), gpus=[machine.uuids[0]])
    stranger(machine.uuids[0], 2 * MIB)
    row = row_of(watchdog.stop([server]))
    assert row.verdict == "freed"
    assert len(row.foreign) == 1


def test_a_device_is_handed_over_while_the_old_server_is_still_ending(machine: Machine, tmp_path: Path) -> None:
    options = {"state_dir": tmp_path / "state", "crash_grace_s": 5.0}
    with harness.Watchdog(**options) as one, harness.Watchdog(**options) as other:  # type: ignore[arg-type]
        old = launched(
            one, machine, "--mib", str(MIB), "--on-term", "free-then-linger:15", gpus=[machine.uuids[0]], grace_s=60.0
        )
        time.sleep(0.3)  # a server that the broker has not seen on its device hands nothing over
        reports: list[harness.StopReport] = []
        thread = threading.Thread(target=lambda: reports.append(one.stop([old])))
        thread.start()
        with launched(other, machine, "--mib", str(MIB), gpus=[machine.uuids[0]]) as new:
            assert old.is_alive, "its memory came back before its end"
            thread.join(SOON_S)
            row = row_of(reports[0])
            assert row.verdict == "freed"
            assert row.waited_s < 10.0
            assert new.is_alive
        assert not old.is_alive


def test_the_store_holds_no_environment_and_no_command_line(watchdog: harness.Watchdog, machine: Machine) -> None:
    secret = "hunter2-in-the-environment"  # noqa: S105 - it is to be looked for
    launched(watchdog, machine, "--mib", str(MIB), env={"TOKEN": secret})
    content = json.dumps(machine.book(machine.state_dir))
    assert content.count("GPU-")
    assert secret not in content
    assert "--mib" not in content
