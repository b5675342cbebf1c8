"""What the page MIGRATION.md makes of each fixture, run as its reader would: the page is the code's only source."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from dropins.serving import Server, program

import harness

PAGE = Path(harness.__file__).with_name("MIGRATION.md")
SECTIONS = ("RemoteOpenAIServer", "popen_launch_server", "pytest-xprocess", "mirakuru", "subprocess.Popen")


def diffs() -> dict[str, list[str]]:
    """Give the lines of each diff by the title of its section."""
    parts = re.split(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = {}
    for title, text in zip(parts[::2], parts[1::2], strict=True):
        (block,) = re.findall(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        found[title.replace("`", "").split()[-1]] = block.splitlines()
    return found


def side(lines: list[str], sign: str) -> str:
    return "\n".join(line[1:] for line in lines if line[:1] in ("", " ", sign)) + "\n"


@pytest.fixture
def stand_ins(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the commands vllm and sglang be the stand-ins."""
    commands = {"vllm": [*Server.command[:-1]], "sglang": [*program("sglang_serve.py")]}
    folder = pytester.mkdir("bin")
    for name, command in commands.items():
        skip = "" if name == "vllm" else "shift; "
        (folder / name).write_text(f'#!/bin/sh\n{skip}exec {" ".join(command)} "$@"\n', encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}", prepend=":")
    monkeypatch.setenv("HARNESS_STATE_DIR", str(pytester.path / "state"))


def test_the_page_has_these_sections() -> None:
    assert tuple(diffs()) == SECTIONS


@pytest.mark.parametrize("section", SECTIONS)
def test_what_was_there_and_what_comes_is_python(section: str) -> None:
    for sign in "-+":
        compile(side(diffs()[section], sign), f"{section} {sign}", "exec")


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("section", "workers"), [*((section, 0) for section in SECTIONS), (SECTIONS[0], 2), (SECTIONS[2], 2)]
)
def test_what_comes_works(section: str, workers: int, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=side(diffs()[section], "+"))
    result = pytester.runpytest_subprocess("-W", "error", *(["-n", str(workers)] if workers else []))
    result.assert_outcomes(passed=1)
