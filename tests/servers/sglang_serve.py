"""A stand-in for `sglang serve`: a launcher, and a scheduler in a process of its own, as SGLang's are.

At SIGTERM the launcher exits at once, whatever the scheduler does; with --stubborn that ignores SIGTERM. GET
/health_generate gives 200, with --api-key to who sends it. --fail-offline: exits with 3 if HF_HUB_OFFLINE is 1. --hang:
takes connections, and never answers.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--host", "--lb-host", dest="host", required=True)
    parser.add_argument("--port", "--lb-port", dest="port", type=int, required=True)
    parser.add_argument("--api-key")
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--num-replicas", type=int)
    parser.add_argument("--tp", type=int)
    for flag in ("--stubborn", "--fail-offline", "--hang", "--daemon"):
        parser.add_argument(flag, action="store_true")
    return parser.parse_args()


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def schedule(arguments: argparse.Namespace) -> None:
    """Be the scheduler; returns in the launcher."""
    if os.fork():
        return
    if arguments.daemon:
        os.setsid()
        if os.fork():
            os._exit(0)
    if arguments.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say("scheduler is up")
    while True:
        time.sleep(3600)  # until it is ended


class Handler(BaseHTTPRequestHandler):
    """Answers the health check."""

    api_key: str | None = None
    hangs = False

    def do_GET(self) -> None:
        """Answer, or never."""
        if self.hangs:
            threading.Event().wait()
        is_allowed = self.api_key is None or self.headers["Authorization"] == f"Bearer {self.api_key}"
        self.send_response(200 if self.path == "/health_generate" and is_allowed else 401)
        self.end_headers()

    def address_string(self) -> str:
        """Look up no name."""
        return "client"


def main() -> None:
    arguments = parse()
    say(f"stdout: {' '.join(sys.argv[1:])}")
    sys.stderr.write(f"stderr: patience {os.environ.get('SGLANG_WAIT_PORT_TIMEOUT')}\n")
    if arguments.fail_offline and os.environ.get("HF_HUB_OFFLINE") == "1":
        sys.exit("the model is not in the cache")
    schedule(arguments)
    Handler.api_key, Handler.hangs = arguments.api_key, arguments.hang
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    ThreadingHTTPServer((arguments.host, arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
