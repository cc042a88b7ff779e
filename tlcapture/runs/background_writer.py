"""Writing files in another thread while the model continues.

The next prompt runs while the attention and logit lens of a prompt are converted to JSON. At most one prompt's files
are queued at a time, so that memory does not grow.
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
    """Writes files in the order in which they are queued, and reports to the run what was written and what failed.

    As a context manager it writes everything that was queued before the context ends, also if that is by an error.
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
        """Queue the files of a prompt, after waiting for those of the previous prompt.

        Args:
            name: of the prompt, for failures.
            files: functions that each write a file; they run in the other thread.
            then: called in the caller's thread after all files were written; not called if one failed.

        Raises:
            NoSpaceError: the device is full; no further files can be written.
        """
        files = list(files)
        self.finish()
        if not files:
            then()
            return
        self._name, self._then = name, then
        self._waiting = [self._pool.submit(write) for write in files]

    def finish(self) -> None:
        """Wait for the files that are queued; raises `NoSpaceError` if the device is full."""
        waiting, self._waiting = self._waiting, []
        then, self._then = self._then, _nothing
        before, full = len(self._run.report.failures), None
        for future in waiting:
            try:
                with self._run.attempt(self._name):
                    self._run.wrote(_result(future))
            except NoSpaceError as error:  # after the results of the other files were reported
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
        raise OutOfMemoryError("out of memory while its files were written") from None


def _nothing() -> None:
    pass
