"""A server's standard output and error in two files of a test's own, while it runs: a thread copies what it writes."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
import tempfile
import threading
import time
from typing import IO, TYPE_CHECKING, Any, TextIO

from harness import logs, procfs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.server import Server

# A file that grows tells nobody.
_POLL_S = 0.05
_READ_BYTES = 1 << 20
_END_S = 5.0
_RECENT_CHARACTERS = 1 << 16
_Decoder = codecs.getincrementaldecoder("utf-8")


class Tee:
    """Copies to the two `files`, and to this process's own standard output and error, until the server has ended."""

    def __init__(self, files: Sequence[Any]) -> None:
        """Take what has `write` and `flush`, for standard output and for standard error."""
        self._files = files
        # Without a name: nothing is left of it, whatever is killed.
        self._errors: IO[bytes] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - `_copy` closes it
        self._thread: threading.Thread | None = None
        self._recent = ""

    def command(self, command: Sequence[str]) -> list[str]:
        """Give what runs a command with its standard error in a file of its own, as the same process."""
        path = f"/proc/{os.getpid()}/fd/{self._errors.fileno()}"
        return ["/bin/sh", "-c", 'errors=$1; shift; exec "$@" 2>>"$errors"', "sh", path, *command]

    def begin(self, server: Server) -> None:
        """Copy what this server writes from now on."""
        self._thread = threading.Thread(target=self._copy, args=(server,), name=f"tee-{server.name}", daemon=True)
        self._thread.start()

    def error_tail(self, lines: int) -> str:
        """Give the last lines of the standard error of a server that has ended."""
        self.end()
        return "\n".join(logs.printable(self._recent).splitlines()[-lines:])

    def end(self) -> None:
        """Wait until all is copied that the server, which has ended or was never launched, has written."""
        if self._thread is not None:
            self._thread.join(_END_S)
        else:
            self._errors.close()

    def _copy(self, server: Server) -> None:
        with contextlib.suppress(OSError), server.log_path.open("rb") as output, self._errors as errors:
            decoders = (_Decoder("replace"), _Decoder("replace"))
            while True:
                is_last = not procfs.is_alive(server.pid, server.start_time)
                written = _copy_new(output, decoders[0], (self._files[0], sys.stdout))
                in_error = _copy_new(errors, decoders[1], (self._files[1], sys.stderr))
                self._recent = (self._recent + in_error)[-_RECENT_CHARACTERS:]
                if is_last and not written and not in_error:
                    return
                if not written and not in_error:
                    time.sleep(_POLL_S)


def _copy_new(source: IO[bytes], decoder: codecs.IncrementalDecoder, sinks: tuple[Any, TextIO]) -> str:
    text = decoder.decode(source.read(_READ_BYTES))
    for sink in sinks if text else ():
        with contextlib.suppress(OSError, ValueError):  # a test has closed its file, or pytest its capture
            sink.write(text)
            sink.flush()
    return text
