"""Events as lines, and what they amount to."""

from __future__ import annotations

from typing import Any

import pytest

from harness.journal import Event
from harness.reporting import events, summary
from harness.reporting.events import Fields, Source


def made(kind: str, number: int = 1, **facts: Any) -> Fields:
    common = {"worker": "", "pid": 1, "test": "test_a.py::test_it", "server": f"s{number}", "id": f"9-{number}"}
    return {"event": kind, "wall_s": 0.0, "monotonic_s": 0.0, **common, "server_pid": 100 + number, **facts}


def ended(number: int = 1, how: str = "asked", seconds: float = 1.0, **facts: Any) -> Fields:
    return made("ended", number, how=how, seconds=seconds, returncode=0, died=False, survivors=[], gpu=[], **facts)


def test_an_event_says_where_and_when() -> None:
    event = Event("launched", 5.0, {"server": "web"}, object())
    found = events.fields(event, Source("gw1", 7, "test_a.py::test_it"), 1000.0)
    assert found == {
        "event": "launched",
        "wall_s": 1005.0,
        "monotonic_s": 5.0,
        "worker": "gw1",
        "pid": 7,
        "test": "test_a.py::test_it",
        "server": "web",
    }
    assert events.parse(events.line(found)) == [found]


def test_any_name_can_be_written() -> None:
    found = made("launched", server="\udcff\n\N{SNOWMAN}")
    assert events.line(found).isascii()
    assert events.parse(events.line(found)) == [found]


@pytest.mark.parametrize(
    "bad", [b"{", b"3", b"[]", b"{}", b'{"event": 3}', b"\xff\x00", b"", b'{"event": "launched", "se']
)
def test_what_is_no_event_is_left_out(bad: bytes) -> None:
    good = events.line(made("ready"))
    assert events.parse(good + bad + b"\n" + good + bad) == [made("ready")] * 2


def test_events_of_many_processes_are_in_their_order() -> None:
    moments: list[Any] = [3.0, 1.0, "bad", 2]
    found = events.merged({**made("ready"), "monotonic_s": moment} for moment in moments)
    assert [event["monotonic_s"] for event in found] == ["bad", 1.0, 2, 3.0]


def test_when_all_is_well_one_line_says_so() -> None:
    found = summary.summarise(
        [
            made("launched", 1),
            made("launched", 2),
            made("ready", 1, seconds=2.0),
            made("ready", 2, seconds=3.5),
            ended(1, "exited", 0.0),
            ended(2, "killed", 1.5),
            made("stopped", seconds=1.5, one_by_one_s=2.5),
            made("leased", seconds=4.0),
        ]
    )
    assert found.is_well
    assert found.line() == (
        "2 servers launched: 1 killed, 1 ended by itself; slowest start 3.50 s ('s2'); slowest stop 1.50 s ('s2');"
        " parallel stops saved 1.00 s; 1 lease of GPUs waited 4.00 s in all, at most 4.00 s"
    )
    assert found.lines() == [
        "servers         2 launched: 1 killed, 1 ended by itself",
        "slowest starts  3.50 s ('s2'), 2.00 s ('s1')",
        "slowest stops   1.50 s ('s2')",
        "parallel stops  1.00 s saved (2.50 s one by one, 1.50 s in parallel)",
        "GPUs            1 lease of GPUs waited 4.00 s in all, at most 4.00 s",
    ]
    assert found.numbers()["harness.killed"] == 1
    assert found.numbers()["harness.gpu_wait_s"] == 4.0
    assert found.as_event()["is_well"] is True


def test_nothing_is_well_too() -> None:
    found = summary.summarise([])
    assert found.is_well
    assert found.line() == "0 servers launched: none has ended"
    assert found.numbers()["harness.slowest_start_s"] == 0.0


def test_a_death_a_leak_and_an_end_that_nobody_saw_are_named() -> None:
    died = {**ended(1, "exited"), "died": True, "returncode": -9, "worker": "gw0"}
    found = summary.summarise(
        [made("launched", 1), made("launched", 2, test=""), died, made("leak", text="server 's3' was left")]
    )
    assert not found.is_well
    assert found.lines() == [
        "servers         2 launched: 1 ended by itself, 1 of them DIED, 1 NOT SEEN TO END",
        "DIED: server 's1': killed by SIGKILL [in test_a.py::test_it, on gw0]",
        "UNKNOWN END: server 's2' (pid 102)",
        "LEAK: server 's3' was left [in test_a.py::test_it]",
    ]


@pytest.mark.parametrize(
    ("end", "leak"),
    [
        ({"how": "unkillable", "survivors": [5, 6]}, "processes of server 's1' survived SIGKILL: 5, 6"),
        ({"how": "unkillable", "survivors": None}, "processes of server 's1' survived SIGKILL: ?"),
        (
            {"gpu": [{"uuid": "GPU-1", "verdict": "freed"}, {"uuid": "GPU-2", "verdict": "held"}]},
            "memory of GPU GPU-2 did not come back from server 's1'",
        ),
    ],
)
def test_what_a_stop_left_is_a_leak(end: dict[str, Any], leak: str) -> None:
    found = summary.summarise([made("launched"), {**ended(), **end}])
    assert not found.is_well
    assert found.leaks == [f"{leak} [in test_a.py::test_it]"]


def test_the_last_end_of_a_server_counts() -> None:
    """One that could not be killed may end later."""
    found = summary.summarise([made("launched"), ended(how="unkillable"), ended(how="killed")])
    assert found.is_well
    assert found.ended == {"asked": 0, "killed": 1, "exited": 0, "unkillable": 0}


def test_what_another_version_wrote_is_no_error() -> None:
    found = summary.summarise(
        [{"event": "launched"}, {"event": "ended", "how": "vanished"}, {"event": "ready"}, {"event": "new"}]
    )
    assert found.launched == 1
    assert found.is_well


def test_of_many_as_many_are_named_as_are_wanted() -> None:
    found = summary.summarise([made("leak", text=f"leak {number}", test="") for number in range(5)])
    assert found.lines(2)[1:] == ["LEAK: leak 0", "LEAK: leak 1", "LEAK: 3 more"]
    assert found.lines(5)[1:] == found.lines()[1:] == [f"LEAK: leak {number}" for number in range(5)]
