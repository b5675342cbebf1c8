"""The form of what the store writes: a slot, which is a line that says what follows it, and JSON. Pure.

Two slots are written in turn, each in place, so the newest whole one is never the one being written. A torn one is
known by its checksum.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

LONGEST_BYTES = 4 << 20
# Sequence number, how many bytes of JSON follow, the boot's id, and the SHA-256 of all but itself; each has its place.
_HEADER = "harness-book-1 {:020d} {:010d} {:36.36} {:64}\n"
_HEADER_BYTES = len(_HEADER.format(0, 0, "", ""))
_READ_HEADER = re.compile(rb"harness-book-1 (\d{20}) (\d{10}) (\S{1,36}) *([0-9a-f]{64})\n")


class NotASlot(Exception):  # noqa: N818 - says what is the matter
    """Content that cannot be written: it is not JSON, or too much."""


@dataclass(frozen=True)
class Slot:
    """One slot as it was found.

    Unless it is whole, `content` is None, and nothing of the rest counts. `is_lost` says that it is not whole but may
    once have been, in this boot.
    """

    sequence: int = 0
    text: bytes = b""
    content: dict[str, Any] | None = None
    is_lost: bool = False


EMPTY = Slot()


def to_text(content: dict[str, Any]) -> bytes:
    """Give content as JSON; raises NotASlot."""
    try:
        text = json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise NotASlot(f"this cannot be written as JSON: {error}") from None
    if len(text) > LONGEST_BYTES - _HEADER_BYTES:
        raise NotASlot(f"{len(text)} bytes of JSON are more than a slot takes")
    return text


def encode(sequence: int, boot: str, text: bytes) -> bytes:
    """Give the bytes of a slot that holds JSON."""
    return _header(sequence, boot, text) + text


def _header(sequence: int, boot: str, text: bytes) -> bytes:
    unsigned = _HEADER.format(sequence, len(text), boot, "").encode("ascii")
    digest = hashlib.sha256(unsigned + text).hexdigest()
    return _HEADER.format(sequence, len(text), boot, digest).encode("ascii")


def decode(raw: bytes, boot: str) -> Slot:
    """Read the bytes of a slot, in this boot. What follows the JSON is left of a longer one that was there before."""
    if len(raw) < _HEADER_BYTES:
        return EMPTY  # its first write has come no further
    header = _READ_HEADER.match(raw)
    if header is None:
        return Slot(is_lost=True)
    sequence, length, written_in = int(header[1]), int(header[2]), header[3].decode("ascii", errors="replace")
    text = raw[_HEADER_BYTES : _HEADER_BYTES + length]
    if len(text) == length and header[0] == _header(sequence, written_in, text):
        content = _content(text)
        return Slot(is_lost=True) if content is None else Slot(sequence, text, content)
    # The first write of all that is torn replaces nothing; and nothing counts that was written before this boot.
    return Slot(is_lost=sequence > 1 and written_in == boot)


def _content(text: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def newest(slots: Sequence[Slot]) -> int | None:
    """Give the place of the newest whole slot; None where there is none."""
    whole = [place for place, slot in enumerate(slots) if slot.content is not None]
    return max(whole, key=lambda place: slots[place].sequence, default=None)
