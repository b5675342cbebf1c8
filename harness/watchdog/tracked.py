"""What the supervisor keeps of each server. Pure."""

from __future__ import annotations

from harness.messages import Outcome, ServerStatus
from harness.watchdog.phases import Phase

TYPE_CHECKING = False
if TYPE_CHECKING:
    from harness.lease_messages import DeviceRelease
    from harness.messages import Survivor
    from harness.watchdog.deadlines import Deadlines


class Tracked:
    """What the supervisor knows of one server."""

    def __init__(self, key: int, name: str, grace_s: float, deadlines: Deadlines) -> None:
        """Begin as launching; its next deadline is kept in `deadlines`."""
        self.key = key
        self.name = name
        self.grace_s = grace_s
        self.launch_id: int | None = key
        self.deadline_s = 0.0
        self.reason = ""
        self.phase = Phase.LAUNCHING
        self.pid = 0
        self.root_exited = False
        self.returncode: int | None = None
        self.exited_at: float | None = None
        self.stop_began: float | None = None
        self.stop_ended: float | None = None
        self.was_asked = False
        self.was_killed = False
        self.keeper_is_lost = False
        self.keeper_was_killed = False
        self.survivors: list[Survivor] = []
        self.gpu: list[DeviceRelease] = []
        self.owes_memory = False
        self._deadlines = deadlines

    @property
    def deadline(self) -> float | None:
        """Give when the next step of its stop is due."""
        return self._deadlines.of(self.key)

    @deadline.setter
    def deadline(self, deadline: float | None) -> None:
        self._deadlines.set(self.key, deadline)

    @property
    def is_over(self) -> bool:
        """Say whether a stop has nothing more to wait for: no process, and no word on its devices' memory."""
        return self.phase.is_over and not self.owes_memory

    def note_exit(self, returncode: int | None, now: float) -> None:
        """Keep how the root ended, and when."""
        self.root_exited = True
        self.returncode = returncode
        self.exited_at = now

    def outcome(self) -> Outcome:
        """Give how it ended."""
        seconds = 0.0
        if self.stop_began is not None and self.stop_ended is not None:
            seconds = self.stop_ended - self.stop_began
        end = (self._how(), self.returncode, seconds, self.survivors, self.reason, self.gpu, self.exited_at)
        return Outcome(self.key, self.name, self.pid, *end)

    def _how(self) -> str:
        if self.phase is Phase.UNKILLABLE:
            return "unkillable"
        if self.was_killed:
            return "killed"
        return "asked" if self.was_asked else "exited"

    def status(self) -> ServerStatus:
        """Give how it is."""
        exit_ = (self.root_exited, self.returncode, self.exited_at)
        return ServerStatus(self.key, self.phase.value, *exit_, self.reason)
