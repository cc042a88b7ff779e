"""Memory that runs out for one prompt, which does not stop a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tlcapture.errors import OutOfMemoryError
from tlcapture.models.memory import is_out_of_memory, release_memory
from tlcapture.runs.run import Run


@contextmanager
def attempt(run: Run, name: str) -> Iterator[None]:
    """Work on one prompt, whose failure, including lack of memory, does not stop the run."""
    try:
        with run.attempt(name):
            yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        run.failed(name, "out of memory: the outputs for this prompt do not fit in memory")
        release_memory()


@contextmanager
def within_memory() -> Iterator[None]:
    """Raise `OutOfMemoryError` where memory runs out while files are written."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError("out of memory while its files were written") from None
