"""What all tests share."""

from __future__ import annotations

import signal

# Where this run was started in the background of a shell, or by nohup, some are ignored, and so they would be in each
# pytest run that a test starts and then interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

pytest_plugins = ["pytester"]
