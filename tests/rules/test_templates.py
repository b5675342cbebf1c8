"""Tokens: exactly five are replaced."""

from __future__ import annotations

import pytest

from harness.templates import HOST, Values, fill, unknown_ports

VALUES = Values({"": 8000, "metrics": 8001}, "rank{port}", "/logs")


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("{port}", "8000"),
        ("--port={port} --metrics={port:metrics}", "--port=8000 --metrics=8001"),
        ("http://{host}:{port}", f"http://{HOST}:8000"),
        ("{log_dir}/{name}.log", "/logs/rank{port}.log"),
        ("{{port}}", "{8000}"),
        ('{"port": "{port}", "a": {"b": {}}}', '{"port": "8000", "a": {"b": {}}}'),
    ],
)
def test_tokens_are_replaced_once(text: str, filled: str) -> None:
    assert fill(text, VALUES) == filled


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "{0}", "{ port }", "{Port}", "{ports}", "{port", "port}", "{port.metrics}", "{port!r}"),
        *("{name:x}", "{host:}", "{logdir}", "%(port)s", "$port", '{"port": 1}', '{"a": {"port": {}}}', "{port:a{b}}"),
    ],
)
def test_every_other_brace_is_left_alone(text: str) -> None:
    assert fill(text, VALUES) == text
    assert unknown_ports(text, ()) == []


def test_names_of_ports_that_are_not_known_are_found() -> None:
    text = "{port} {port:metrics} {port:http} {port:} {port:HTTP}"
    assert unknown_ports(text, ("metrics",)) == ["http", "", "HTTP"]
