"""A supervisor that a test drives: told events at times that the test chooses, with all that it did kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from harness.messages import Adopt, BeginTest, Launch, ServerStatus, Status, Stop, Stopped
from harness.watchdog import events
from harness.watchdog.supervisor import Supervisor

if TYPE_CHECKING:
    from harness.messages import Reply, Request, Survivor
    from harness.watchdog.events import Effect, Event

CRASH_GRACE_S = 5.0
START = 1000.0
_Kind = TypeVar("_Kind")


def launch_of(
    name: str = "a",
    grace_s: float = 15.0,
    deadline_s: float | None = None,
    lease: int | None = None,
    devices: list[str] | None = None,
) -> Launch:
    """Give a request to launch a server."""
    named = devices or []
    return Launch(
        name,
        ["program"],
        {},
        [],
        "/",
        [],
        "/log",
        "/",
        "root",
        grace_s,
        deadline_s,
        lease,
        named,
        None,
        "",
        is_literal=False,
    )


def begin_of(deadline_s: float | None = 10.0, grace_s: float = 8.0) -> BeginTest:
    """Give a request that begins a test."""
    return BeginTest("test_a", deadline_s, grace_s, 51, "/stacks", "/report", 2)


class DrivenSupervisor:
    """The supervisor, the replies to each request, and the effects: of all events, and of the latest one."""

    def __init__(self) -> None:
        self.rules = Supervisor(crash_grace_s=CRASH_GRACE_S)
        self.now = START
        self.replies: dict[int, list[Reply]] = {}
        self._launches = 0
        self.effects: list[Effect] = []
        self.latest: list[Effect] = []

    @property
    def deadline_s(self) -> float | None:
        """The next deadline, in seconds since the start."""
        deadline = self.rules.next_deadline()
        return None if deadline is None else deadline - START

    def at(self, seconds: float) -> DrivenSupervisor:
        """Move the clock to so many seconds since the start."""
        self.now = START + seconds
        return self

    def tell(self, event: Event) -> list[Effect]:
        self.latest = self.rules.handle(event, self.now)
        for effect in self.latest:
            if isinstance(effect, events.Answer):
                self.replies[effect.request_id].append(effect.reply)
        self.effects += self.latest
        return self.latest

    def tick(self, seconds: float) -> list[Effect]:
        return self.at(seconds).tell(events.Tick())

    def request(self, request: Request) -> int:
        """Send a request, and give its id: that of a launch, which is the server's key, is a small number."""
        is_launch = isinstance(request, (Launch, Adopt))
        self._launches += is_launch
        request_id = self._launches if is_launch else 1000 + len(self.replies)
        self.replies[request_id] = []
        self.tell(events.Requested(request_id, request))
        return request_id

    def launching(self, name: str = "a", grace_s: float = 15.0) -> int:
        """Request a launch, and give the server's key."""
        self.request(launch_of(name, grace_s))
        return self.made(events.Spawn)[-1].key

    def running(self, name: str = "a", grace_s: float = 15.0) -> int:
        """Launch a server whose root executes its program, and give its key."""
        key = self.launching(name, grace_s)
        self.tell(events.Started(key, 100 + key, 7, 200 + key, {"": 8000}))
        return key

    def stop(self, *keys: int, grace_s: float | None = None, kill: bool = False) -> int:
        return self.request(Stop(list(keys), grace_s, kill))

    def stuck(self, key: int, survivor: Survivor) -> None:
        """Kill a server and say that it did not end."""
        self.stop(key, kill=True)
        self.tell(events.TreeStuck(key, [survivor]))

    def status(self, key: int) -> ServerStatus:
        status = self.reply(self.request(Status(key)))
        assert isinstance(status, ServerStatus)
        return status

    def phase(self, key: int = 1) -> str:
        return self.status(key).phase

    def reply(self, request_id: int) -> Reply:
        """Give the one reply to a request."""
        (reply,) = self.replies[request_id]
        return reply

    def stopped(self, request_id: int) -> Stopped:
        reply = self.reply(request_id)
        assert isinstance(reply, Stopped)
        return reply

    def made(self, kind: type[_Kind]) -> list[_Kind]:
        """Give every effect of this kind so far."""
        return [effect for effect in self.effects if isinstance(effect, kind)]

    @property
    def latest_acts(self) -> list[Effect]:
        """The latest effects that are neither replies nor lines in the log."""
        return [effect for effect in self.latest if not isinstance(effect, (events.Answer, events.Log))]
