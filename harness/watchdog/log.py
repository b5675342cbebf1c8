"""The watchdog's own log file. It holds no environment value and no argument of a server: both may be secrets."""

from __future__ import annotations

import os
import time

from harness import private


class Log:
    """Appends lines to one file, which is made with the first line."""

    def __init__(self, path: str) -> None:
        """Take the path."""
        self.path = path
        self._descriptor: int | None = None

    def reopened(self) -> Log:
        """Give a log of the same file for a forked child, which has closed this one's descriptor."""
        return Log(self.path)

    def write(self, text: str) -> None:
        """Append a line; a full disk or a missing directory must not disturb the watchdog."""
        try:
            if self._descriptor is None:
                self._descriptor = private.open_file(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            now = time.strftime("%Y-%m-%dT%H:%M:%S")
            os.write(self._descriptor, f"{now} [{os.getpid()}] {text}\n".encode(errors="replace"))
        except OSError:
            return

    def mistake(self, error: BaseException) -> None:
        """Append where an unexpected error arose: its type and the lines it passed, not its text."""
        places = []
        trace = error.__traceback__
        while trace is not None:
            places.append(f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}")
            trace = trace.tb_next
        self.write(f"unexpected {type(error).__name__} at {' > '.join(places)}")
