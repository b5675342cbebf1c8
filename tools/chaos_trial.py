"""Runs one trial: starts its pytest run, does its faults at their instant, and judges what is left."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools import chaos_faults, chaos_judge, chaos_say
from tools.chaos_people import People, Person
from tools.chaos_result import Result
from tools.chaos_steps import PYTEST, STEPS, TARGETS, WATCHDOG, WORKER

if TYPE_CHECKING:
    from tools.chaos_count import Place
    from tools.chaos_plan import Fault, Plan
    from tools.chaos_result import Around

# A step that is not reached in this time after the servers are up (or after the start) will not be.
STEP_LIMIT_S = 4.0
_UP_LIMIT_S = 20.0
_KILL_LIMIT_S = 20.0
_TARGET_LIMIT_S = 1.0
_SHORTEST_S = 0.002
_POLL_S = 0.01
_STEP_UP = "the servers are up"
_PLUGINS = ("no:cacheprovider", "no:doctest", "no:unittest", "no:pastebin", "no:junitxml", "no:stepwise")
# Of the tool's own test run: its coverage, its pytest.
_NOT_PASSED_ON = ("COVERAGE_", "PYTEST_")
_ROOT = Path(__file__).parent.parent


def run(plan: Plan, directory: Path, around: Around) -> Result:
    """Run a trial in a directory, which is made and must be short of name."""
    began = time.monotonic()
    trial = _Trial(plan, directory, around)
    try:
        trial.run()
    except Exception as error:  # noqa: BLE001 - one trial that breaks is a failure with a name; the others go on
        trial.result.error = f"{type(error).__name__}: {error}"
    try:
        trial.clear_away()
    except Exception as error:  # noqa: BLE001 - as above
        trial.result.error += f" {type(error).__name__}: {error}"
    trial.result.seconds = time.monotonic() - began
    return trial.result


class _Trial:
    def __init__(self, plan: Plan, directory: Path, around: Around) -> None:
        self.plan = plan
        self._limit_s = around.limit_s
        self._flaw = around.flaw
        self.result = Result(plan.seed, plan.fault, plan.target, plan.when.step, plan.workers)
        self._directory = directory
        directory.mkdir(mode=0o700)
        self._bystanders = around.bystanders
        self._sibling = directory.with_name(f"{directory.name}-sibling")
        self._place: Place = around.places.new(directory.name, directory, around.bystanders.is_one)
        self._disk: chaos_faults.Disk | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._arrivals = 0
        self._held: list[socket.socket] = []
        self._strike_at: float | None = None
        self._struck_at: float | None = None
        self._up_at: float | None = None
        self._near: int | None = None
        self._was_missing = False
        self._to_kill: list[tuple[float, Person]] = []
        self._process: subprocess.Popen[bytes] | None = None

    # ---- start and end

    def run(self) -> None:
        self._prepare()
        self._start()
        while not self._has_ended():
            self._wait()
            self._act()
        self._judge()

    def _prepare(self) -> None:
        (self._directory / "mark").touch()
        if self.plan.fault == "fill the log disk":
            self._disk = chaos_faults.Disk(self._directory / "state")
        self._listener.bind(str(self._directory / "say"))
        self._listener.listen(64)
        self._listener.setblocking(False)

    def _start(self) -> None:
        if self.plan.has_sibling:
            self._sibling.mkdir()
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(_NOT_PASSED_ON)},
            "HARNESS_STATE_DIR": str(self._directory / "state"),
            "HARNESS_CGROUP": "on" if self.plan.may_use_cgroups else "off",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPATH": str(_ROOT),
            chaos_say.SETTINGS: json.dumps(self._settings()),
        }
        with open(self._directory / "output", "wb") as output:
            self._process = subprocess.Popen(
                self._place.command(self._command()),
                cwd=self._directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._began = time.monotonic()
        self._pidfd = os.pidfd_open(self._process.pid)
        is_ours = self._is_ours
        self._people = People(self._process.pid, has_workers=self.plan.workers > 0, is_ours=is_ours)
        if not self.plan.when.step and not self.plan.when.is_while_stopping and self.plan.failure is None:
            self._strike_at = self._began + self.plan.when.after_s

    def _is_ours(self, pid: int) -> bool:
        return pid in self._place.pids()

    def _settings(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "socket": str(self._directory / "say"),
            "mark": str(self._directory / "mark"),
            "step": plan.when.step,
            "failure": None if plan.failure is None else asdict(plan.failure),
            "tests": [[asdict(server) for server in servers] for servers in plan.tests],
            "flaw": self._flaw,
            "bystander": str(self._bystanders.marks / "up"),
            "sibling": [str(self._sibling), *self._bystanders.cgroups] if plan.has_sibling else None,
        }

    def _command(self) -> list[str]:
        plugins = [*_PLUGINS, "tools.chaos_plugin", "harness.plugin", *(["xdist"] if self.plan.workers else [])]
        options = [part for name in plugins for part in ("-p", name)]
        if self.plan.workers:
            options += ["-n", str(self.plan.workers)]
        return [
            *(sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--rootdir={self._directory}"),
            *("-o", f"harness_crash_grace_s={self.plan.crash_grace_s}"),
            *options,
            str(Path(__file__).with_name("chaos_case.py")),
        ]

    def clear_away(self) -> None:
        """End what is left, and close what is open."""
        if self.result.is_failure:
            self.result.output = self._evidence()
        for connection in self._held:
            connection.close()
        for _, person in self._to_kill:
            person.close()
        self._listener.close()
        if self._place.pids():
            self._place.kill()
            chaos_judge.wait_empty(self._place, time.monotonic() + _KILL_LIMIT_S)
        if self._process is not None:
            self._process.wait()
            os.close(self._pidfd)
        self._place.remove()
        if self._disk is not None:
            self._disk.remove()

    def _evidence(self) -> str:
        files = [self._directory / "output", *self._directory.glob("state/runs/*/watchdog.log")]
        texts = []
        for path in files:
            with contextlib.suppress(OSError):
                texts.append(f"--- {path.name}\n{path.read_text(encoding='utf-8', errors='replace')[-6000:]}")
        return "\n".join(texts)

    # ---- what is waited for

    def _has_ended(self) -> bool:
        if self._struck_at is None:
            return self._pytest_has_ended()
        if self._to_kill:
            return False
        return self._pytest_has_ended() or time.monotonic() > self._struck_at + self._limit_s

    def _pytest_has_ended(self) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def _wait(self) -> None:
        times = [at for at, _ in self._to_kill]
        if self._struck_at is None:
            times.append(self._give_up_at() if self._strike_at is None else self._strike_at)
        else:
            times.append(self._struck_at + self._limit_s)
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)
        poll.poll(max(_SHORTEST_S, min(times) - time.monotonic()) * 1000)

    def _give_up_at(self) -> float:
        return self._began + _UP_LIMIT_S if self._up_at is None else self._up_at + STEP_LIMIT_S

    def _act(self) -> None:
        self._hear()
        now = time.monotonic()
        if self._struck_at is None and self._strike_at is not None and self._strike_at <= now:
            self._strike_at_instant()
        elif self._struck_at is None and self._give_up_at() <= now:
            self._strike_at_step(is_reached=False)
        for due in [due for due in self._to_kill if due[0] <= now]:
            self._to_kill.remove(due)
            due[1].send(signal.SIGKILL)
            due[1].close()

    # ---- what the trial's processes say

    def _hear(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            connection.settimeout(1.0)
            facts = chaos_say.receive(connection)
            self._heard(connection, facts)

    def _heard(self, connection: socket.socket, facts: dict[str, Any]) -> None:
        if facts.get("hello"):
            self._people.hear_hello(facts["pid"])
        elif facts.get("failed"):
            self._note_struck(is_reached=True)
        elif facts.get("step"):
            self._at_step(connection, facts["step"], facts["pid"])
            return
        connection.close()

    def _at_step(self, connection: socket.socket, step: str, pid: int) -> None:
        if step == _STEP_UP:
            self._at_up()
        if step == self.plan.when.step:
            self._arrivals += 1
            if self._arrivals == self.plan.when.nth and self._struck_at is None:
                self._near = pid
                self._strike_at_step(is_reached=True)
        if step == _STEP_UP and self._must_hold():
            self._held.append(connection)
        else:
            chaos_say.let_go(connection)

    def _at_up(self) -> None:
        if self._up_at is None:
            self._up_at = time.monotonic()
            if self.plan.when.is_while_stopping:
                self._strike_at = self._up_at + self.plan.when.after_s

    def _must_hold(self) -> bool:
        # A fault that comes at any instant finds the servers up; a step of a stop is reached only by going on.
        if self._struck_at is not None or self.plan.failure is not None or self.plan.when.is_while_stopping:
            return False
        step = STEPS.get(self.plan.when.step)
        return step is None or not step.is_while_stopping

    # ---- the fault

    def _strike_at_instant(self) -> None:
        """Strike if the targets are there; else when they have come, and some time later."""
        people = self._find_people()
        now = time.monotonic()
        if people is None:
            self._was_missing = True
            self._strike_at = now + _POLL_S if now < self._give_up_at() else None
        elif self._was_missing:
            self._was_missing = False
            self._strike_at = now + self.plan.when.late_s
            _close(people)
        else:
            self._strike(people, is_reached=True)

    def _strike_at_step(self, *, is_reached: bool) -> None:
        people = self._find_people()
        deadline = time.monotonic() + _TARGET_LIMIT_S
        while people is None and time.monotonic() < deadline and not self._pytest_has_ended():
            time.sleep(_SHORTEST_S)  # nothing announces a process
            people = self._find_people()
        self._strike(people or [], is_reached=is_reached and people is not None)

    def _strike(self, people: list[Person | None], *, is_reached: bool) -> None:
        struck = list(zip(self.plan.faults, people, strict=False))
        for fault, person in struck:
            way = chaos_faults.strike(fault, person, self._place, self._disk)
            self.result.ways += [way] if way else []
        self._note_struck(is_reached=is_reached)
        for fault, person in struck:
            self._after(fault, person)

    def _note_struck(self, *, is_reached: bool) -> None:
        self._struck_at = time.monotonic()
        self.result.is_reached = is_reached
        held, self._held = self._held, []
        for connection in held:
            chaos_say.let_go(connection)

    def _find_people(self) -> list[Person | None] | None:
        """Find the target of each fault; None if one of them is not there. A log disk is nobody."""
        found: list[Person | None] = []
        for fault in self.plan.faults:
            if fault.target not in TARGETS:
                found.append(None)
                continue
            # Where two are hit, they are of one family.
            person = self._find(fault, self._near if not found or found[0] is None else found[0].pid)
            if person is None:
                _close(found)
                return None
            found.append(person)
        return found

    def _find(self, fault: Fault, near: int | None) -> Person | None:
        person = self._people.find(fault.target, near, self.plan.seed)
        is_deaf = person is not None and fault.kind == "close the Pipe" and not chaos_faults.can_close_pipe(person.pid)
        return None if is_deaf else person

    def _after(self, fault: Fault, person: Person | None) -> None:
        """Have a stopped test process killed after a while, as CI does it; likewise a stopped watchdog's."""
        if person is None:
            return
        due = time.monotonic() + self.plan.linger_s
        if fault.signal == signal.SIGSTOP and fault.target in {PYTEST, WORKER}:
            self._to_kill.append((due, person))
            return
        if fault.signal == signal.SIGSTOP and fault.target == WATCHDOG:
            client = self._people.client_of(person.pid)
            with contextlib.suppress(ProcessLookupError):
                if client is not None:
                    self._to_kill.append((due, Person(client, PYTEST)))
        person.close()

    def _judge(self) -> None:
        self._listener.close()  # nobody waits any more: who would say something is refused, and goes on
        struck_at = self._struck_at or time.monotonic()
        may_be_left = self.plan.may_leave_to_sweep
        deadline = struck_at + (self._limit_s / 2 if may_be_left else self._limit_s)
        chaos_judge.end_test_processes(self._place, self._people, deadline)
        clean_at = chaos_judge.wait_empty(self._place, deadline)
        if clean_at is not None:
            self.result.clean_s = clean_at - struck_at
        elif may_be_left:
            self.result.left_to_sweep = len(self._place.pids())
            if chaos_judge.sweep(self._directory / "state"):
                chaos_judge.wait_empty(self._place, time.monotonic() + self._limit_s / 2)
                self.result.survivors = chaos_judge.describe(self._place, self._people)
        else:
            self.result.survivors = chaos_judge.describe(self._place, self._people)
        self.result.harmed = [*self._bystanders.harmed(), *self._bystanders.harmed_sibling(self._sibling)]


def _close(people: list[Person | None]) -> None:
    for person in people:
        if person is not None:
            person.close()
