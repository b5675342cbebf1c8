"""Every error that the harness raises.

One root, `HarnessError`; each error carries what it knows as fields beside its text, and survives pickling
(pytest-xdist and multiprocessing send errors between processes).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:  # see the package
    from typing import Any


class HarnessError(RuntimeError):
    """The root of every error of the harness; a RuntimeError, as many suites' own harnesses raise.

    Fields: `server` (its name, or None), `returncode` (`subprocess.Popen`'s convention, or None if it is not known or
    the server still ran) and `log_tail` (the last lines of the server's log, or "").
    """

    def __init__(
        self, message: str, *, server: str | None = None, returncode: int | None = None, log_tail: str = ""
    ) -> None:
        """Keep the text and the fields."""
        super().__init__(message)
        self.message = message
        self.server = server
        self.returncode = returncode
        self.log_tail = log_tail

    def __str__(self) -> str:
        """Give the text and, if there is one, the tail of the log below it."""
        if not self.log_tail:
            return self.message
        indented = "\n".join(f"  | {line}" for line in self.log_tail.splitlines())
        return f"{self.message}\n  last lines of its log:\n{indented}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by text and fields: the default would call the class with positional arguments alone."""
        return (_rebuild, (type(self), self.message, self.__dict__))


def _rebuild(kind: type[HarnessError], message: str, fields: dict[str, Any]) -> HarnessError:
    error = kind(message)
    error.__dict__.update(fields)
    return error


class SpecError(HarnessError, ValueError):
    """What was asked for cannot be done: the arguments are wrong. Nothing was started."""


class LaunchFailed(HarnessError):  # noqa: N818 - the name is the public contract, and reads as what happened
    """The server's program could not be started. Nothing of it is running."""


class ServerExited(HarnessError):  # noqa: N818 - the name is the public contract
    """A server ended while it was waited for. What it left behind has been stopped."""


class NotReady(HarnessError, TimeoutError):  # noqa: N818 - the name is the public contract
    """A server was not ready in time, or its readiness check raised."""


class WatchdogDied(HarnessError):  # noqa: N818 - the name is the public contract
    """The watchdog process has ended or does not answer. Its servers are stopped by their keepers."""


class GpuUnavailable(HarnessError):  # noqa: N818 - the name is the public contract
    """The GPUs that were asked for cannot be had. Nothing was started.

    `is_absent`: this machine has too few of them, or none, and nothing is out of order.
    """

    is_absent = False


class GpuNotReleased(HarnessError):  # noqa: N818 - the name is the public contract
    """GPU memory of a stopped server did not come back."""


class Leaked(HarnessError):  # noqa: N818 - the name is the public contract
    """Processes of a server survived its stop."""


class PlatformNotSupported(HarnessError):  # noqa: N818 - the name is the public contract
    """The platform lacks something that the watchdog needs; the text names it."""
