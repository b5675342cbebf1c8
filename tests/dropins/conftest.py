"""Drop-ins find a watchdog by themselves: here it is the test's own, and nothing of it may be left."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
from edges.conftest import assert_listens_nobody, nothing_survives, run_script, watchdog

from harness import current

if TYPE_CHECKING:
    from collections.abc import Iterator

    import harness

__all__ = ["assert_listens_nobody", "nothing_survives", "run_script", "watchdog"]


@pytest.fixture
def own(watchdog: harness.Watchdog) -> Iterator[harness.Watchdog]:
    """Have the drop-ins of this process use this test's own watchdog."""

    def source() -> harness.Watchdog:
        return watchdog

    current.use(source)
    yield watchdog
    current.use_no_more(source)
    gc.collect()  # a multiprocessing.Process has two descriptors for as long as it is there
