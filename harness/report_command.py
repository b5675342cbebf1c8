"""`python -m harness report`: what the events in a file of `--harness-report` amount to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import HarnessError
from harness.reporting import events, summary

if TYPE_CHECKING:
    from harness.reporting.summary import Summary


def read(path: str) -> Summary:
    """Sum up a file, "-" for the standard input; raises HarnessError if it cannot be read or holds no event."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise HarnessError(f"cannot read {path}: {error.strerror}") from None
    found = events.parse(data)
    if data.strip() and not found:
        raise HarnessError(f"{path} holds no event: it was not written by --harness-report")
    return summary.summarise(events.merged(found))
