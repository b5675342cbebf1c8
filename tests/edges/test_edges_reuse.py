"""A number that was given away must never be taken for the process that had it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from harness import procfs
from harness.messages import Adopt
from harness.watchdog.adopted import Adopted
from harness.watchdog.sweep import Sweeper, _strike

SLEEP = [shutil.which("sleep") or "sleep", "60"]


def stat_of(pid: int) -> procfs.Stat:
    found = procfs.stat(pid)
    assert found is not None
    return found


def test_children_of_an_adopted_process_that_was_reaped_are_not_its_own() -> None:
    """Its number may be another's by then, with children of that one's."""
    with subprocess.Popen(SLEEP) as root, subprocess.Popen(SLEEP) as child:
        adopted = Adopted(1, Adopt("a", root.pid, stat_of(root.pid).start_time, 1.0))
        of_root = stat_of(child.pid).replaced(parent=root.pid)
        assert adopted._is_child(of_root, root.pid)
        root.kill()
        root.wait()
        assert not adopted._is_child(of_root, root.pid)
        for descriptor in adopted.pidfds.values():
            os.close(descriptor)
        child.kill()


def test_a_process_below_another_with_its_parents_number_is_not_struck() -> None:
    with subprocess.Popen(SLEEP) as child:
        me = stat_of(os.getpid())
        assert _strike(child.pid, me.replaced(start_time=me.start_time + 1)) is None
        assert _strike(child.pid, me.replaced(pid=1)) is None
        assert child.poll() is None
        struck = _strike(child.pid, me)
        assert struck is not None
        assert child.wait(30) == -9


def test_a_sweep_strikes_what_is_below_and_spares_what_it_is_told_to() -> None:
    script = "import subprocess, sys; print(flush=True); subprocess.run(['sleep', '60'])"
    with (
        subprocess.Popen(SLEEP) as spared,
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True) as top,
    ):
        assert top.stdout is not None
        top.stdout.readline()
        others = frozenset(procfs.children(os.getpid())) - {top.pid}
        Sweeper().sweep(others)
        assert top.wait(30) == -9
        assert spared.poll() is None
        spared.kill()
