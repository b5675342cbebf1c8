"""Whose the processes are that a device lists, and who is alive."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from harness import procfs
from harness.broker.trees import Tree

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def child() -> Iterator[int]:
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
        yield process.pid  # it ends when its standard input is closed


def test_what_descends_from_the_keeper_is_the_servers(child: int) -> None:
    tree = Tree(os.getpid())
    assert tree.look([child, 1, os.getpid()])
    assert tree.listed([child, 1, os.getpid()]) == {child}
    assert not tree.look([child]), "it is known already"


def test_a_process_that_is_known_to_be_the_servers_is_so_after_its_end() -> None:
    """A device may go on listing it, and nobody can look at its parents any more."""
    tree = Tree(os.getpid())
    tree.add(1 << 22, 5)
    assert not tree.look([1 << 22])
    assert tree.listed([1 << 22]) == {1 << 22}


def test_a_process_whose_parent_ends_meanwhile_is_looked_at_again(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has another parent at the next look, and may descend from the keeper all the same."""
    tree = Tree(os.getpid())
    real = procfs.stat(child)
    assert real is not None
    with monkeypatch.context() as patched:
        between = {child: procfs.Stat(child, "S", 1 << 30, real.process_group, real.session, real.start_time)}
        patched.setattr(procfs, "stat", between.get)
        assert not tree.look([child])
    assert tree.look([child])


def test_a_number_that_another_has_now_is_not_the_servers(child: int) -> None:
    tree = Tree(os.getpid())
    tree.look([child])
    tree.own[child] -= 1
    assert tree.listed([child]) == set()


def test_who_is_hidden_is_not_known_to_be_dead(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hidepid=, /proc does not show other users' processes, and kill(2) refuses to signal them."""
    found = procfs.stat(child)
    assert found is not None
    assert procfs.may_be_alive(child, found.start_time) is True
    assert procfs.may_be_alive(child, found.start_time - 1) is False
    assert procfs.may_be_alive(1 << 22, 1) is False
    monkeypatch.setattr(procfs, "stat", lambda _pid: None)

    def refuse(_pid: int, _number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert procfs.may_be_alive(child, found.start_time) is None
