"""Files written in another thread while the model goes on.

While JSON is made of a prompt's attention and logit lens, the next prompt's matrix products can run. At
most one prompt's files wait at a time, so that memory does not grow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from tlcapture.errors import TlcaptureError
from tlcapture.runs.report import RunReport

Write = Callable[[], int]  # writes a file and returns its size


class BackgroundWriter:
    """Writes files in the order in which they come, and tells the report what was written and what failed.

    As a context manager it has written everything when the context ends, however it ends.
    """

    def __init__(self, report: RunReport):
        self._report = report
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._waiting: list[tuple[str, Future[int]]] = []

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True)
        self.finish()

    def write(self, name: str, files: Iterable[Write]) -> None:
        """Have the files of a prompt written, once those of the prompt before are."""
        files = list(files)
        self.finish()
        self._waiting = [(name, self._pool.submit(write)) for write in files]

    def finish(self) -> None:
        """Wait for what is being written."""
        waiting, self._waiting = self._waiting, []
        for name, future in waiting:
            try:
                self._report.wrote(future.result())
            except TlcaptureError as error:
                self._report.failed(name, error)
