"""The tokens that are replaced in a server's command and environment. Pure.

Exactly `{port}`, `{port:NAME}`, `{host}`, `{name}` and `{log_dir}` are replaced; every other brace is left alone, since
arguments that are JSON are common.
"""

from __future__ import annotations

import re

from harness.records import Record

HOST = "127.0.0.1"
_TOKEN = re.compile(r"\{(?:(port)(?::([^{}]*))?|(host|name|log_dir))\}")


class Values(Record):
    """What the tokens stand for; `ports` has the main port under ""."""

    ports: dict[str, int]
    name: str
    log_dir: str


def unknown_ports(text: str, ports: tuple[str, ...]) -> list[str]:
    """Give the names in `{port:NAME}` tokens that are not among `ports`."""
    named = [match.group(2) for match in _TOKEN.finditer(text) if match.group(2) is not None]
    return [name for name in named if name not in ports or not name]


def fill(text: str, values: Values) -> str:
    """Replace the tokens; the names of ports must be known."""

    def value(match: re.Match[str]) -> str:
        if match.group(1):
            return str(values.ports[match.group(2) or ""])
        return {"host": HOST, "name": values.name, "log_dir": values.log_dir}[match.group(3)]

    return _TOKEN.sub(value, text)
