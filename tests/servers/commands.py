"""Commands of the server programs in this folder, and what those programs have said in their logs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import harness

FOLDER = Path(__file__).parent
# How long a server of these tests may take to get ready on a machine that is busy.
READY_S = 30.0

# Ignores SIGTERM, and so does its child: an ignored signal stays ignored over execve.
STUBBORN = ["sh", "-c", 'trap "" TERM; sleep 60 & echo ready; wait']


def _python(program: str, *arguments: str) -> list[str]:
    return [sys.executable, "-I", "-S", str(FOLDER / program), *arguments]


def member(
    name: str = "root",
    *children: dict[str, object],
    term: str = "exit",
    takes_s: float = 0.0,
    code: int = 0,
    daemon: bool = False,
    leaves: bool = False,
) -> dict[str, object]:
    """Plan a member of a family.

    `term` is what it does on SIGTERM: "exit" with `code` after `takes_s`, "note" it and go on, or "ignore" it.
    `daemon`: it is forked twice, into a session of its own. `leaves`: it exits with `code` once its children are ready.
    """
    return {
        "name": name,
        "children": list(children),
        "term": term,
        "takes_s": takes_s,
        "code": code,
        "daemon": daemon,
        "leaves": leaves,
    }


def family(root: dict[str, object]) -> list[str]:
    """Give the command of a server that is this family."""
    return _python("family.py", json.dumps(root))


def web(behaviour: str | int) -> list[str]:
    """Give the command of an HTTP server: see web.py for its behaviours."""
    return _python("web.py", "{port}", str(behaviour))


def said(server: harness.Server, name: str, event: str) -> list[str]:
    """Give what a member of the family has said with each event of a kind: a pid, or a time."""
    lines = server.log_path.read_text(encoding="utf-8").splitlines()
    return [line.split()[-1] for line in lines if line.startswith(f"{name} {event} ")]


def pid_of(server: harness.Server, name: str) -> int:
    """Give the pid of a member of the family that is ready."""
    return int(said(server, name, "ready")[0])


def time_of(server: harness.Server, name: str, event: str) -> float:
    """Give the monotonic time of a member's first event of a kind."""
    return float(said(server, name, event)[0])
