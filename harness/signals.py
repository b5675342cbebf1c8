"""Exit codes in words."""

from __future__ import annotations

import signal


def describe(returncode: int | None) -> str:
    """Say what a `subprocess.Popen` return code means: "exit code 3", "killed by SIGKILL", "exit code unknown"."""
    if returncode is None:
        return "exit code unknown"
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"
