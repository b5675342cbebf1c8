"""Every change of a server's phase, as one table.

Rule 1: a server's phase changes only through `TRANSITIONS`. Rule 2: a (phase, sign) pair that is not in the table
changes nothing, since signs may come late or twice (a process can exit between being asked and being killed).
"""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    """Where a server is in its life."""

    LAUNCHING = "launching"  # its keeper has been forked, its root has not executed the program yet
    RUNNING = "running"  # its root is alive
    DETACHED = "detached"  # its root has exited by itself; the tree may live on (a daemon)
    ASKED = "asked"  # SIGTERM was sent; the grace runs
    KILLED = "killed"  # SIGKILL is being sent to the whole tree
    LOST = "lost"  # its keeper died; the watchdog sweeps what was re-parented to it
    UNKILLABLE = "unkillable"  # SIGKILL did not end it in time; still watched
    GONE = "gone"  # no process of it is left

    @property
    def is_up(self) -> bool:
        """Say whether nobody has begun to end it, and it has not ended."""
        return self in {Phase.LAUNCHING, Phase.RUNNING, Phase.DETACHED}

    @property
    def is_over(self) -> bool:
        """Say whether a stop has nothing more to wait for."""
        return self in {Phase.GONE, Phase.UNKILLABLE}


class Sign(Enum):
    """What can happen to a server."""

    STARTED = "its root has executed the program"
    FAILED = "its root could not execute the program"
    EXITED = "its root has exited"
    EMPTY = "no process of its tree is left"
    STUCK = "processes of it did not end on SIGKILL in time"
    KEEPER_LOST = "its keeper died"
    ASK = "it is to be asked to exit"
    KILL = "it is to be killed"


TRANSITIONS: dict[tuple[Phase, Sign], Phase] = {
    (Phase.LAUNCHING, Sign.STARTED): Phase.RUNNING,
    (Phase.LAUNCHING, Sign.FAILED): Phase.GONE,
    (Phase.LAUNCHING, Sign.EMPTY): Phase.GONE,
    (Phase.LAUNCHING, Sign.KEEPER_LOST): Phase.LOST,
    (Phase.LAUNCHING, Sign.ASK): Phase.ASKED,
    (Phase.LAUNCHING, Sign.KILL): Phase.KILLED,
    (Phase.RUNNING, Sign.EXITED): Phase.DETACHED,
    (Phase.RUNNING, Sign.EMPTY): Phase.GONE,
    (Phase.RUNNING, Sign.KEEPER_LOST): Phase.LOST,
    (Phase.RUNNING, Sign.ASK): Phase.ASKED,
    (Phase.RUNNING, Sign.KILL): Phase.KILLED,
    (Phase.DETACHED, Sign.EMPTY): Phase.GONE,
    (Phase.DETACHED, Sign.KEEPER_LOST): Phase.LOST,
    (Phase.DETACHED, Sign.ASK): Phase.ASKED,
    (Phase.DETACHED, Sign.KILL): Phase.KILLED,
    (Phase.ASKED, Sign.FAILED): Phase.GONE,
    (Phase.ASKED, Sign.EMPTY): Phase.GONE,
    (Phase.ASKED, Sign.KEEPER_LOST): Phase.LOST,
    (Phase.ASKED, Sign.KILL): Phase.KILLED,
    (Phase.KILLED, Sign.FAILED): Phase.GONE,
    (Phase.KILLED, Sign.EMPTY): Phase.GONE,
    (Phase.KILLED, Sign.KEEPER_LOST): Phase.LOST,
    (Phase.KILLED, Sign.STUCK): Phase.UNKILLABLE,
    (Phase.LOST, Sign.EMPTY): Phase.GONE,
    (Phase.LOST, Sign.STUCK): Phase.UNKILLABLE,
    (Phase.UNKILLABLE, Sign.EMPTY): Phase.GONE,
    (Phase.UNKILLABLE, Sign.FAILED): Phase.GONE,
    (Phase.UNKILLABLE, Sign.KEEPER_LOST): Phase.LOST,
}


def after(phase: Phase, sign: Sign) -> Phase:
    """Give the phase that follows."""
    return TRANSITIONS.get((phase, sign), phase)
