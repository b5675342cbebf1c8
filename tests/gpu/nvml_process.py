"""A process that uses NVML as the broker does: each line that it is given is a call, each line that it says an answer.

Lines are JSON: ["open"], ["devices"], ["read", UUID], ["close"]; ["begin", UUID] reads in a thread, ["child", CALL ...]
has a forked child do a call. ["strict", FUNCTION] makes a function of pynvml raise NVMLLibraryMismatchError where the
driver does not have it, as its unversioned functions do. Answers are {kind: content}.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from typing import Any

from harness.broker.nvml import NoGpuSupport, Nvml
from harness.broker.readings import Fault


class Calls:
    """What can be asked for."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._begun: list[threading.Thread] = []

    def open(self) -> dict[str, Any]:
        self._nvml = Nvml()
        return {"opened": True}

    def devices(self) -> dict[str, Any]:
        return {"devices": [dataclasses.asdict(device) for device in self._nvml.devices()]}

    def read(self, uuid: str) -> dict[str, Any]:
        found = self._nvml.read(uuid)
        return {"fault" if isinstance(found, Fault) else "reading": dataclasses.asdict(found)}

    def begin(self, uuid: str) -> dict[str, Any]:
        self._begun.append(threading.Thread(target=lambda: say(self.read(uuid)), daemon=True))
        return {"begun": True}

    def start_begun(self) -> None:
        """Start what has been begun, once that has been said: else its own answer might come first."""
        while self._begun:
            self._begun.pop().start()

    def child(self, *call: str) -> dict[str, Any]:
        child = os.fork()
        if child == 0:
            say(self.answer(list(call)))
            os._exit(0)
        os.waitpid(child, 0)
        return {"child ended": True}

    def close(self) -> dict[str, Any]:
        self._nvml.close()
        return {"closed": True}

    def strict(self, function: str) -> dict[str, Any]:
        import pynvml  # noqa: PLC0415 - as in the broker, it is loaded where it is used

        if not hasattr(pynvml, "throwOnVersionMismatch"):
            return {"too old": True}
        setattr(pynvml, function, pynvml.throwOnVersionMismatch(getattr(pynvml, function)))
        return {"strict": True}

    def answer(self, call: list[str]) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = getattr(self, call[0])(*call[1:])
        except NoGpuSupport as error:
            return {"no support": {"text": str(error), "is_absent": error.is_absent}}
        except Exception as error:  # noqa: BLE001 - whatever gets out is the answer
            return {"raised": f"{type(error).__name__}: {error}"}
        return answer


def say(answer: dict[str, Any]) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    calls = Calls()
    for line in sys.stdin:
        say(calls.answer(json.loads(line)))
        calls.start_begun()
