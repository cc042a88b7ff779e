"""Pretend, for a whole run of pytest, that there is a GPU."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest

os.environ["TLCAPTURE_TEST_DEVICE"] = "cuda"

from tests.pretend_cuda import streams
from tests.pretend_cuda.stand_ins import BeyondPretenceError, pretend

pretend()
_BEYOND = {
    "test_norms_compute_nothing_for_hook_points_without_hooks": "counts operators, and each calls others here",
    "test_copies_and_pickles_compute_with_their_own_weights": "torch's own library reads a pickle's storages",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot be pretended."""
    for item in items:
        if item.name in _BEYOND:
            item.add_marker(pytest.mark.skip(reason=_BEYOND[item.name]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Skip the rest of a test that needs more than is pretended."""
    try:
        return (yield)
    except BeyondPretenceError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    """Fail a test after which work on the GPU was in the right order by luck."""
    streams.FAULTS.clear()
    yield
    assert not streams.FAULTS
