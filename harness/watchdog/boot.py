"""The program of the watchdog process, executed as a file: `python -I -S boot.py CONFIG`.

The client forks it with multiprocessing and then executes this file, so that nothing of the test process is left in it
but what CONFIG, a JSON object, names: no memory (a fork would pin the test process's old pages for good), no lock, no
mapping of a GPU.
"""

from __future__ import annotations

import json
import os
import sys


def boot() -> None:
    """Find the package without running the test process's site configuration, and run the watchdog."""
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    sys.path.append(package)
    from harness.watchdog import main  # noqa: PLC0415 - it can be found only now

    main.main(json.loads(sys.argv[1]))


if __name__ == "__main__":
    boot()
