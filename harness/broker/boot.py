"""The program of the broker process, executed as a file: `python -I -S boot.py CONFIG`, CONFIG being a JSON object.

The watchdog starts it at the first lease. It does not run the test process's site configuration, as the watchdog does
not, so CONFIG says where its libraries are.
"""

from __future__ import annotations

import json
import os
import sys


def boot() -> None:
    """Find the package and the libraries, and run the broker."""
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    config = json.loads(sys.argv[1])
    # The program's own folder is first, where `book` would be found as a module of its own.
    sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]
    sys.path += [path for path in [package, *config["paths"]] if path not in sys.path]
    from harness.broker import main  # noqa: PLC0415 - it can be found only now

    main.main(config)


if __name__ == "__main__":
    boot()
