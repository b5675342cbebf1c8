"""Clients of the libraries openai and anthropic, which are imported when one is asked for: they are extras."""

from __future__ import annotations

import importlib
from typing import Any

from harness.errors import HarnessError

# vLLM's suite waits so long for an answer, and asks once.
_TIMEOUT_S = 600
_RETRIES = 0


def make(library: str, kind: str, *, base_url: str, api_key: str, uds: str | None, options: dict[str, Any]) -> Any:
    """Make a client: `kind` is a class of `library`, and `options` are its own, over the defaults.

    For a server on a socket file (`uds`) it has a transport of its own. Raises HarnessError if the library is missing.
    """
    try:
        module = importlib.import_module(library)
    except ImportError as error:
        raise HarnessError(f"{error}: a client needs `pip install pytest-watchdog-harness[{library}]`") from error
    defaults: dict[str, Any] = {"timeout": _TIMEOUT_S, "max_retries": _RETRIES}
    if uds is not None:
        defaults["http_client"] = _on_socket_file(module, uds, is_async=kind.startswith("Async"))
    return getattr(module, kind)(base_url=base_url, api_key=api_key, **{**defaults, **options})


def _on_socket_file(module: Any, uds: str, *, is_async: bool) -> Any:
    # Of the module that the library itself uses: some releases use httpx, some httpx2.
    client = module.DefaultAsyncHttpxClient if is_async else module.DefaultHttpxClient
    httpx: Any = importlib.import_module(client.__bases__[0].__module__.partition(".")[0])
    return client(transport=httpx.AsyncHTTPTransport(uds=uds) if is_async else httpx.HTTPTransport(uds=uds))
