"""Specifications: what is right comes through, and what is wrong is a SpecError before anything is started."""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest

from harness import specs
from harness.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Callable


class BytesPath(os.PathLike[bytes]):
    """A path, but not one in text."""

    def __fspath__(self) -> bytes:
        return b"/tmp"


def nothing(_server: object) -> bool:
    return True


async def is_up(_server: object) -> bool:
    return True


TEXTS: list[object] = [None, 3, b"a", BytesPath(), ["a"], "nul\0", ""]
BAD: dict[str, tuple[Callable[[object], object], list[object]]] = {
    "text": (lambda value: specs.text(value, "it"), TEXTS),
    "seconds": (
        lambda value: specs.seconds(value, "it"),
        [None, "1", b"1", True, False, 0, 0.0, -0.0, -1, -0.5, math.nan, math.inf, -math.inf, 1j, [1.0]],
    ),
    "optional_seconds": (lambda value: specs.optional_seconds(value, "it"), ["1", True, 0, -1, math.nan, math.inf]),
    "name": (specs.name, TEXTS),
    "optional_name": (specs.optional_name, [value for value in TEXTS if value is not None]),
    "command": (
        specs.command,
        [
            *(None, 3, "vllm serve", b"vllm", bytearray(b"vllm"), [], (), {"vllm"}, {"vllm": 1}, iter(["vllm"])),
            *([""], [None], [3], [b"vllm"], ["a\0"], ["a", "b\0"], ["a", None], ["a", 8000], ["a", ["b"]]),
            *(["a", b"b"], [BytesPath()]),
        ],
    ),
    "ports": (
        specs.ports,
        [
            *(None, 3, "metrics", b"metrics", [""], [None], [8000], [b"a"], ["a\0"], ["a:b"], ["{a"], ["a}"]),
            *(["a", "b", "a"], ("a", "a")),
        ],
    ),
    "ask": (specs.ask, [None, "", "Root", "tree", 0, True, b"root"]),
    "ready": (specs.ready, ["/health", 3, True, [], {}, is_up]),
    "environment": (
        specs.environment,
        [
            *("A=1", [("A", "1")], {"A"}, 3, {"A": 1}, {"A": b"1"}, {"A": True}, {"A": "nul\0"}, {"": "1"}),
            *({"A=B": "1"}, {"A\0": "1"}, {1: "1"}, {b"A": "1"}, {None: "1"}, {"A=B": None}),
        ],
    ),
    "working_directory": (
        specs.working_directory,  # type: ignore[dict-item]
        ["", "nul\0", 3, b"/", BytesPath(), "/does/not/exist", Path(__file__)],
    ),
}


@pytest.mark.parametrize(("check", "value"), [(check, value) for check, values in BAD.values() for value in values])
def test_what_is_wrong_is_a_spec_error(check: Callable[[object], object], value: object) -> None:
    with pytest.raises(SpecError):
        check(value)


@pytest.mark.parametrize(
    ("check", "value"),
    [
        pytest.param(specs.ask, ["root"], id="unhashable"),
        pytest.param(BAD["seconds"][0], 10**400, id="huge"),
    ],
)
def test_what_python_itself_chokes_on_is_a_spec_error(check: Callable[[object], object], value: object) -> None:
    with pytest.raises(SpecError):
        check(value)


@pytest.mark.parametrize(
    ("checked", "expected"),
    [
        (specs.text(PurePosixPath("/bin/true"), "it"), "/bin/true"),
        (specs.text("", "it", may_be_empty=True), ""),
        (specs.text("\udc80", "it"), "\udc80"),
        (specs.seconds(3, "it"), 3.0),
        (specs.seconds(1e-9, "it"), 1e-9),
        (specs.optional_seconds(None, "it"), None),
        (specs.optional_seconds(2, "it"), 2.0),
        (specs.name("a b/c"), "a b/c"),
        (specs.optional_name(None), None),
        (specs.optional_name("a"), "a"),
        (specs.command(["a"]), ["a"]),
        (specs.command((PurePosixPath("/a"), "", '{"b": 1}')), ["/a", "", '{"b": 1}']),
        (specs.ports(()), ()),
        (specs.ports(name for name in ["a", "b c"]), ("a", "b c")),
        (specs.ask("root"), "root"),
        (specs.ask("group"), "group"),
        (specs.ready(None), None),
        (specs.ready(nothing), nothing),
    ],
)
def test_what_is_right_comes_through(checked: object, expected: object) -> None:
    assert checked == expected
    assert type(checked) is type(expected)


def test_an_error_names_what_is_wrong() -> None:
    with pytest.raises(SpecError, match="argument 2 of the command must be a string, not int"):
        specs.command(["a", "b", 8000])
    with pytest.raises(SpecError, match="grace_s must be more than 0 seconds and at most 31622400, not -1"):
        specs.seconds(-1, "grace_s")


def test_the_value_of_an_environment_variable_is_in_no_error() -> None:
    with pytest.raises(SpecError) as caught:
        specs.environment({"TOKEN": "secret\0"})
    assert "TOKEN" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_environment_is_that_of_now_with_the_changes_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "1")
    monkeypatch.setenv("CHANGED", "1")
    monkeypatch.setenv("REMOVED", "1")
    merged = specs.environment({"CHANGED": "", "REMOVED": None, "NEVER_THERE": None, "PATH_LIKE": Path("/a")})
    expected = {**os.environ, "CHANGED": "", "PATH_LIKE": "/a"}
    del expected["REMOVED"]
    assert merged == expected
    assert specs.environment(None) == dict(os.environ)


def test_the_working_directory_is_that_of_now_or_the_one_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    assert specs.working_directory(None) == str(tmp_path)
    assert specs.working_directory("sub") == str(tmp_path / "sub")
    assert specs.working_directory(tmp_path) == str(tmp_path)


def test_a_working_directory_that_was_removed_is_a_spec_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed = tmp_path / "removed"
    removed.mkdir()
    monkeypatch.chdir(removed)
    removed.rmdir()
    for given in (None, "."):
        with pytest.raises(SpecError):
            specs.working_directory(given)


@pytest.mark.parametrize("place", ["command", "environment"])
def test_a_token_for_a_port_that_is_not_there_is_a_spec_error(place: str) -> None:
    text = "{port} {port:metrics} {port:http}"
    command = ["a", text if place == "command" else ""]
    environment = {"A": text if place == "environment" else "", "NOT_TEMPLATED": "{port:other}"}
    spec = specs.ServerSpec(None, command, environment, ("A",), ports=("metrics",))
    with pytest.raises(SpecError, match=r"\{port:http\} is not among ports=\['metrics'\]"):
        specs.check_tokens(spec)
    specs.check_tokens(specs.ServerSpec(None, command, environment, ("A",), ports=("metrics", "http")))
