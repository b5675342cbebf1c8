"""The server under test: a tiny ASGI application."""

from __future__ import annotations

import os
from typing import Any


async def app(scope: dict[str, Any], _receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    body = f"rank {os.environ.get('RANK', '?')} from worker {os.getpid()}\n".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": body})
