"""Errors: each survives pickling, and says what it knows."""

from __future__ import annotations

import copy
import pickle

import pytest

import harness
from harness import errors

KINDS = [
    *(errors.HarnessError, errors.SpecError, errors.LaunchFailed, errors.ServerExited, errors.NotReady),
    *(errors.WatchdogDied, errors.GpuUnavailable, errors.GpuNotReleased, errors.Leaked, errors.PlatformNotSupported),
]


def test_every_error_is_tried_here_and_is_public() -> None:
    assert {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)} == {
        *KINDS
    }
    assert all(getattr(harness, kind.__name__) is kind for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_each_error_comes_back_whole(kind: type[errors.HarnessError]) -> None:
    error = kind("ended", server="rank0", returncode=-9, log_tail="last line")
    for copied in (
        *(pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)),  # noqa: S301
        copy.copy(error),
    ):
        assert type(copied) is kind
        assert vars(copied) == vars(error)
        assert copied.args == ("ended",)
        assert (copied.message, copied.server, copied.returncode, copied.log_tail) == (
            "ended",
            "rank0",
            -9,
            "last line",
        )
        assert str(copied) == str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_knows_nothing_but_its_text_if_it_is_told_nothing_else(kind: type[errors.HarnessError]) -> None:
    error = pickle.loads(pickle.dumps(kind("ended")))  # noqa: S301
    assert (str(error), error.server, error.returncode, error.log_tail) == ("ended", None, None, "")


def test_the_tail_of_the_log_is_below_the_text() -> None:
    error = errors.ServerExited("'rank0' ended", log_tail="one\n  two\n")
    assert str(error) == "'rank0' ended\n  last lines of its log:\n  | one\n  |   two"


@pytest.mark.parametrize(("kind", "builtin"), [(errors.SpecError, ValueError), (errors.NotReady, TimeoutError)])
def test_errors_that_are_also_builtin_ones(kind: type[errors.HarnessError], builtin: type[Exception]) -> None:
    with pytest.raises(builtin, match="text"):
        raise kind("text")
