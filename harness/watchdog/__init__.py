"""All that runs in the watchdog process and in its keepers, and nothing else.

These modules import one another, `frames`, `messages`, `templates`, `procfs` and a few light modules of the standard
library. They must not import the client's side, pytest, psutil or filelock, nor heavy modules such as dataclasses,
logging, subprocess or multiprocessing: the watchdog is started for every pytest process and has 6 MiB to live in.
"""
