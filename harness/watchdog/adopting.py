"""All adopted servers of one watchdog: turns their pidfds into events, and carries out effects on them."""

from __future__ import annotations

import time
from functools import partial

from harness.watchdog import events
from harness.watchdog.adopted import Adopted
from harness.watchdog.keeper_rules import KILL_LIMIT_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.messages import Adopt

# Between two rounds of killing an adopted tree; only a round finds what was forked since the last one.
_ROUND_S = 0.005


class Adopting:
    """The adopted servers, by key."""

    def __init__(
        self,
        watch: Callable[[int, Callable[[], None]], None],
        forget: Callable[[int], None],
        tell: Callable[[events.Event], None],
    ) -> None:
        """Take the loop's functions that watch a descriptor, forget it, and tell the supervisor."""
        self._watch = watch
        self._forget = forget
        self._tell = tell
        self._servers: dict[int, Adopted] = {}
        self._watched: dict[int, set[int]] = {}
        self._killing: dict[int, float] = {}
        self.deadline: float | None = None

    def take(self, key: int, adopt: Adopt) -> None:
        """Begin to watch a process."""
        try:
            server = Adopted(key, adopt)
        except ProcessLookupError as error:
            self._tell(events.LaunchFailed(key, f"{adopt.name!r}: {error}"))
            return
        self._servers[key] = server
        self._watched[key] = set()
        self._watch_members(server)
        self._tell(events.Started(key, adopt.pid, adopt.start_time, 0, {}))

    def ask(self, key: int) -> None:
        """Ask an adopted server to exit; any other is left alone."""
        if key in self._servers:
            self._servers[key].ask()
            self._watch_members(self._servers[key])

    def kill(self, key: int) -> None:
        """Kill an adopted server, round after round until nothing of it is left."""
        if key in self._servers:
            self._killing.setdefault(key, time.monotonic() + KILL_LIMIT_S)
            self._round(self._servers[key])
            self._tell(events.KillSeen(key))

    def signal(self, key: int, number: int) -> None:
        """Send a signal to the root."""
        if key in self._servers:
            self._servers[key].send(self._servers[key].root, number)

    def see_time(self, now: float) -> None:
        """Do the next round of killing where one is due."""
        if self.deadline is None or self.deadline > now:
            return
        self.deadline = None
        for key, limit in list(self._killing.items()):
            self._round(self._servers[key])
            if now >= limit:
                del self._killing[key]
                self._tell(events.TreeStuck(key, self._servers[key].survivors()))

    def _round(self, server: Adopted) -> None:
        server.kill()
        self._watch_members(server)
        self.deadline = time.monotonic() + _ROUND_S

    def _watch_members(self, server: Adopted) -> None:
        for pid in set(server.pidfds) - self._watched[server.key]:
            self._watched[server.key].add(pid)
            self._watch(server.pidfds[pid], partial(self._member_ended, server, pid))

    def _member_ended(self, server: Adopted, pid: int) -> None:
        server.look()
        self._watch_members(server)
        self._forget(server.pidfds[pid])
        self._watched[server.key].discard(pid)
        server.forget(pid)
        if pid == server.root:
            self._tell(events.RootExited(server.key, None))
        if not server.pidfds:
            self._killing.pop(server.key, None)
            del self._servers[server.key], self._watched[server.key]
            self._tell(events.TreeGone(server.key))
        elif server.is_asking and server.root_is_gone:
            server.ask()
