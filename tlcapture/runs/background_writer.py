"""Files written in another thread while the model goes on.

While JSON is made of a prompt's attention and logit lens, the next prompt's matrix products can run. At
most one prompt's files wait at a time, so that memory does not grow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from tlcapture.errors import NoSpaceError, OutOfMemoryError
from tlcapture.models.memory import is_out_of_memory
from tlcapture.runs.run import Run
from tlcapture.storage.files import Written

Write = Callable[[], Written]


class BackgroundWriter:
    """Writes files in the order in which they come, and tells the run what was written and what failed.

    As a context manager it has written everything when the context ends, however it ends.
    """

    def __init__(self, run: Run):
        self._run = run
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._name = ""
        self._waiting: list[Future[Written]] = []
        self._then: Callable[[], object] = _nothing

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True)
        self.finish()

    def write(self, name: str, files: Iterable[Write], *, then: Callable[[], object] = lambda: None) -> None:
        """Have the files of a prompt written, once those of the prompt before are.

        `then` is called, in the caller's thread, when all of them are written, and not where one failed.
        """
        files = list(files)
        self.finish()
        if not files:
            then()
            return
        self._name, self._then = name, then
        self._waiting = [self._pool.submit(write) for write in files]

    def finish(self) -> None:
        """Wait for what is being written."""
        waiting, self._waiting = self._waiting, []
        then, self._then = self._then, _nothing
        before, full = len(self._run.report.failures), None
        for future in waiting:
            try:
                with self._run.attempt(self._name):
                    self._run.wrote(_result(future))
            except NoSpaceError as error:  # what others wrote is told first
                full = full or error
        if full is not None:
            raise full
        if len(self._run.report.failures) == before:
            then()


def _result(future: Future[Written]) -> Written:
    try:
        return future.result()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError("out of memory while its files were made") from None


def _nothing() -> None:
    pass
