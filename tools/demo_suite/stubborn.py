"""A server that ignores SIGTERM, as one does that hangs in its own shutdown. Usage: stubborn.py PORT."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from collections.abc import Iterator


class Stubborn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        yield


Stubborn(uvicorn.Config("app:app", port=int(sys.argv[1]))).run()
