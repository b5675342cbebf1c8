"""The requests that have not been answered yet: stops, and waits for a server's end. Pure."""

from __future__ import annotations

from harness.messages import Stop, Stopped, Wait

TYPE_CHECKING = False
if TYPE_CHECKING:
    from harness.messages import Reply, Request
    from harness.watchdog.tracked import Tracked

# Each thread of a client waits for one reply; a client that asks without waiting must not fill the memory.
MOST_UNANSWERED = 1024


class Stopping:
    """A Stop or Close that has not been answered yet."""

    def __init__(self, request_id: int, servers: dict[int, Tracked], began: float, *, leave: bool) -> None:
        """Begin at the monotonic time `began`; `leave`: the watchdog ends with it."""
        self.request_id = request_id
        self.servers = servers
        self.began = began
        self.leave = leave
        self.living = sum(not server.is_over for server in servers.values())


class Waiting:
    """A Wait that has not been answered yet."""

    def __init__(self, request_id: int, server: Tracked, until: str, deadline: float) -> None:
        """Wait until "exit" or "gone", or until the monotonic time `deadline`."""
        self.request_id = request_id
        self.server = server
        self.until = until
        self.deadline = deadline

    @property
    def is_reached(self) -> bool:
        """Say whether what is waited for has happened."""
        return self.server.phase.is_over or (self.until == "exit" and self.server.root_exited)


class Pending:
    """All of them."""

    def __init__(self) -> None:
        """Begin with none."""
        self._stoppings: list[Stopping] = []
        self._waitings: list[Waiting] = []

    def is_full_for(self, request: Request) -> bool:
        """Say whether a request of this kind would be one too many."""
        if isinstance(request, Wait):
            return len(self._waitings) >= MOST_UNANSWERED
        return isinstance(request, Stop) and len(self._stoppings) >= MOST_UNANSWERED

    def add(self, request: Stopping | Waiting) -> None:
        """Keep a request until it can be answered."""
        if isinstance(request, Stopping):
            self._stoppings.append(request)
        else:
            self._waitings.append(request)

    def deadlines(self) -> list[float]:
        """Give when those that wait have waited long enough."""
        return [waiting.deadline for waiting in self._waitings]

    def count(self, key: int, ended: int) -> None:
        """Take note that a stop has nothing more to wait for at this server (1), or has again (-1)."""
        for stopping in self._stoppings:
            stopping.living -= ended if key in stopping.servers else 0

    def take(self, now: float) -> tuple[list[tuple[int, Reply]], bool]:
        """Take away what can be answered: the replies, and whether the watchdog ends with one of them."""
        replies: list[tuple[int, Reply]] = []
        for waiting in [w for w in self._waitings if w.is_reached or w.deadline <= now]:
            self._waitings.remove(waiting)
            replies.append((waiting.request_id, waiting.server.status()))
        is_leaving = False
        for stopping in [s for s in self._stoppings if not s.living]:
            self._stoppings.remove(stopping)
            outcomes = [server.outcome() for server in stopping.servers.values()]
            replies.append((stopping.request_id, Stopped(outcomes, now - stopping.began)))
            is_leaving = is_leaving or stopping.leave
        return replies, is_leaving
