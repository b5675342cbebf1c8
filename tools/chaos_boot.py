"""The watchdog's program in a trial: what harness/watchdog/boot.py does, once the trial's calls have been wrapped."""

from __future__ import annotations

import json
import os
import sys


def boot() -> None:
    """Wrap, and run the watchdog."""
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from tools import chaos_hooks  # noqa: PLC0415 - it can be found only now

    chaos_hooks.install(is_in_client=False)
    from harness.watchdog import main  # noqa: PLC0415 - as above

    main.main(json.loads(sys.argv[1]))


if __name__ == "__main__":
    boot()
