"""Progress of long waits: one line that moves on a terminal, a line every 20 s elsewhere."""

from __future__ import annotations

import contextlib
import os
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from harness import logs

if TYPE_CHECKING:
    from harness.reporting.events import Fields

_EVERY_S = 20.0
# A wait that has said nothing for so long is that of a process that has died.
_STALE_S = 5.0
_MOST_NAMES = 4
_WAITS = {"ready": "until ready: {}", "stop": "for the stop of {}", "gpus": "for the GPUs of {}"}


class Progress:
    """The waits that go on, of all workers."""

    def __init__(self, screen: Screen) -> None:
        """Take where to show them."""
        self._screen = screen
        self._waits: dict[tuple[object, ...], Fields] = {}
        self._next_s: dict[tuple[object, ...], float] = {}

    def take(self, event: Fields) -> None:
        """Show that a wait goes on, or that it is over."""
        key = (event.get("pid"), event.get("wait"))
        if event["event"] == "waited":
            self._forget(key)
        elif event["event"] == "waiting":
            self._waits[key] = event
            self._show(key, event)

    def _show(self, key: tuple[object, ...], event: Fields) -> None:
        self.forget_stale(event["monotonic_s"])
        if self._screen.moves:
            self._screen.move(" · ".join(map(describe, self._waits.values())))
        elif event["seconds"] >= self._next_s.setdefault(key, _EVERY_S):
            self._next_s[key] += _EVERY_S
            self._screen.line(describe(event))

    def forget_stale(self, now: float) -> None:
        """Show no longer what a process waited for that has died, at this moment of `time.monotonic()`."""
        for stale in [key for key, wait in self._waits.items() if now - wait["monotonic_s"] > _STALE_S]:
            self._forget(stale)

    def make_room(self) -> None:
        """Take the moving line away; the next word of a wait brings it back."""
        self._screen.clear()

    def _forget(self, key: tuple[object, ...]) -> None:
        self._waits.pop(key, None)
        self._next_s.pop(key, None)
        if not self._waits:
            self._screen.clear()

    def close(self) -> None:
        """Leave nothing on the screen that looks as if it went on."""
        self._waits = {}
        self._screen.clear()


def describe(event: Fields) -> str:
    """Say in one line how long who has waited for what, and what the server wrote last."""
    worker = f"{event['worker']}: " if event["worker"] else ""
    names = [repr(name) for name in event["servers"]]
    if len(names) > _MOST_NAMES:
        names[_MOST_NAMES - 1 :] = [f"{len(names) - _MOST_NAMES + 1} more"]
    what = _WAITS.get(event["what"], "for {}").format(", ".join(names))
    parts = [f"{worker}{event['seconds']:.0f} s of {event['limit_s']:g} s {what}"]
    parts += [text for text in (last_line(event["log"]), event["awaited"]) if text]
    return logs.printable(" | ".join(parts)).strip()


def last_line(log: str) -> str:
    """Give the last line of a log that holds something; "" if there is none."""
    lines = [text for _, text in logs.tail_since(Path(log), 10, 0) if text.strip()] if log else []
    return lines[-1].strip() if lines else ""


class Screen:
    """Where progress is shown: pytest's standard output, whatever captures what tests write there."""

    def __init__(self, descriptor: int) -> None:
        """Take a descriptor, which is closed by `close`."""
        self._descriptor = descriptor
        self.moves = os.isatty(descriptor) and os.environ.get("TERM", "dumb") != "dumb"
        self._is_shown = False

    def line(self, text: str) -> None:
        """Write a line of its own: pytest may be in the midst of one."""
        self._write(f"\nharness: {text}\n")

    def move(self, text: str) -> None:
        """Show a line below the cursor, which stays where pytest has it."""
        shown = _cut(f"harness: {text}", self._columns() - 1)
        # IND and RI (ECMA-48, VT100) make room below in the last row too. Then: save, go down, write, restore.
        self._write(f"\x1bD\x1bM\x1b7\x1bD\r{shown}\x1b[K\x1b8")
        self._is_shown = True

    def clear(self) -> None:
        """Remove the line below the cursor."""
        if self._is_shown:
            self._write("\x1b7\x1bD\r\x1b[K\x1b8")
            self._is_shown = False

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._descriptor).columns or 80
        except OSError:
            return 80

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # it is for people who may have gone
            os.write(self._descriptor, text.encode(errors="replace"))

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)


def _cut(text: str, columns: int) -> str:
    """Give as much of a text as has room in so many columns, "..." if that is not all."""
    widths = [2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text]
    if sum(widths) <= columns:
        return text
    room = columns - 3
    kept = 0
    while kept < len(text) and widths[kept] <= room:
        room -= widths[kept]
        kept += 1
    return text[:kept] + "..."
