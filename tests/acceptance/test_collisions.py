"""Workers of one machine do not meet: ports, logs and entries of the ledger, with 16 of them at once."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from acceptance.recording import CONFTEST, IMPORTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest
    from acceptance.recording import Record

WORKERS = 16
LAUNCHES = 10_000
TESTS = 48
PICKER = Path(__file__).parents[1] / "servers" / "port_picker.py"


class Event(NamedTuple):
    """A port that was taken (after which it is held), or is about to be given back."""

    at_ns: int
    is_take: bool
    kind: str
    pid: int
    port: int


@contextlib.contextmanager
def picker(kind: str, record: Path, picks: int, seed: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-I", "-S", str(PICKER), kind, str(record), str(picks), str(seed)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def begin(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def pick(directory: Path, kind: str, picks: int, *, strangers: int) -> list[Event]:
    """Let 16 processes pick ports at once, with strangers beside them; give what they have written down."""
    record = directory / "ports"
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(picker(kind, record, picks // WORKERS, seed)) for seed in range(WORKERS)]
        others = [stack.enter_context(picker("stranger", record, 0, seed)) for seed in range(strangers)]
        for process in [*others, *workers]:
            begin(process)
        assert [worker.wait(60) for worker in workers] == [0] * WORKERS
        assert all(other.poll() is None for other in others)
    lines = [line.split() for line in record.read_text(encoding="ascii").splitlines()]
    events = [Event(int(at), what == "take", who, int(pid), int(port)) for at, what, who, pid, port in lines]
    return sorted(events)


def collisions(events: list[Event]) -> list[tuple[Event, str]]:
    """Find ports that two had at a time; what strangers have among themselves is theirs."""
    workers: dict[int, int] = {}
    strangers: Counter[int] = Counter()
    found = []
    for event in events:
        if event.is_take:
            if event.port in workers or (event.kind != "stranger" and strangers[event.port]):
                found.append((event, f"with {workers.get(event.port, 'a stranger')}"))
            if event.kind == "stranger":
                strangers[event.port] += 1
            else:
                workers[event.port] = event.pid
        elif event.kind == "stranger":
            strangers[event.port] -= 1
        else:
            workers.pop(event.port, None)
    return found


def most_at_once(events: list[Event]) -> int:
    held = most = 0
    for event in events:
        held += (1 if event.is_take else -1) * (event.kind != "stranger")
        most = max(most, held)
    return most


def test_no_port_is_given_twice(tmp_path: Path) -> None:
    """Ports for 10,000 launches, picked as the watchdog picks them; two strangers take any port all the time."""
    events = pick(tmp_path, "holds", LAUNCHES, strangers=2)
    takes = Counter(event.kind for event in events if event.is_take)
    assert takes["holds"] > LAUNCHES
    assert takes["stranger"] > 1000
    assert most_at_once(events) > 10 * WORKERS
    assert collisions(events) == []


def test_the_usual_way_of_finding_a_free_port_collides(tmp_path: Path) -> None:
    """So the test above would see it."""
    assert collisions(pick(tmp_path, "free", LAUNCHES, strangers=1))


SUITE = """
import json
from harness import runs, state_dir

def entries():
    run = state_dir.run_of(os.getpid())
    paths = [path for path in runs.entries(run.parent.parent) if path.parent == run]
    return [[json.loads(line) for line in path.read_text().splitlines() if line] for path in paths]

@pytest.mark.parametrize("number", range({tests}))
def test_servers(server_group, number):
    servers = [server_group.launch(["sleep", "100"], ports=["a", "b"], name=f"rank{rank}") for rank in range(5)]
    # A keeper writes its second line while its root comes up.
    processes.wait_for(lambda: all(len(lines) > 1 for lines in entries()), 30.0, "keepers that have come up")
    marks, logs, roots = zip(*[(first["mark"], first["log"], second["root"][0]) for first, second in entries()])
    assert sorted(roots) == sorted(server.pid for server in servers)
    assert sorted(logs) == sorted(str(server.log_path) for server in servers)
    ports = [port for server in servers for port in {server.port, *server.ports.values()}]
    people = processes.identities([*roots, *map(processes.parent, roots)])
    note("held", ports=ports, marks=marks, logs=logs, people=people)
    note("given", ports=ports)
"""


def test_workers_share_nothing(pytester: pytest.Pytester, record: Record, state_dir: Path) -> None:
    """240 real launches of 16 workers with one state directory."""
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(IMPORTS + SUITE.replace("{tests}", str(TESTS)))
    pytester.runpytest_subprocess("-n", str(WORKERS), timeout=90).assert_outcomes(passed=TESTS)
    held = record.notes("held")
    kinds = [(note, is_take) for what, is_take in (("held", True), ("given", False)) for note in record.notes(what)]
    events = [
        Event(int(note["at"] * 1e9), is_take, "holds", note["client"], port)
        for note, is_take in kinds
        for port in note["ports"]
    ]
    assert sum(event.is_take for event in events) == TESTS * 5 * 3
    assert collisions(sorted(events)) == []
    assert len({note["client"] for note in held}) == WORKERS
    for key in ("marks", "logs"):
        assert len(set(chain.from_iterable(note[key] for note in held))) == TESTS * 5
    assert not list(state_dir.glob("runs/*/server-*"))
