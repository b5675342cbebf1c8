"""What tests ask about cgroups: whether there can be any here, and which are left. Reads /sys without the harness."""

from __future__ import annotations

import os
from pathlib import Path


def mount() -> Path | None:
    """Give where cgroup v2 is mounted."""
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        if " - cgroup2 " in line:
            return Path(line.split()[4])
    return None


def mounted() -> Path:
    """Give where cgroup v2 is mounted; it must be."""
    found = mount()
    assert found is not None
    return found


def own() -> Path | None:
    """Give the directory of this process's cgroup, if it could make one below it and move processes there."""
    above = mount()
    if above is None:
        return None
    path = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    directory = above / path.strip("/")
    is_usable = os.access(directory, os.W_OK) and os.access(directory / "cgroup.procs", os.W_OK)
    # The root cgroup has no cgroup.kill of its own; what is made below it has.
    return directory if is_usable else None


def of_watchdog(pid: int) -> list[Path]:
    """Give the cgroups of a watchdog, wherever they are."""
    above = mount()
    if above is None:
        return []
    # os.walk leaves out what is removed while it walks: other tests have cgroups as well.
    found = [Path(path) / name for path, names, _ in os.walk(above) for name in names]
    return sorted(path for path in found if path.name.startswith(f"harness-{pid}-"))
