"""Writing the files of prompts in other threads while the model continues.

The remaining work on a finished prompt is one job: converting its activations, projecting them, making
JSON, writing the files. A job has its own run, whose report is added to that of the whole run in the order of the
prompts, so that the report does not depend on which prompt was written first. The memory that jobs hold is bounded.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache, partial
from threading import Condition
from typing import NamedTuple

import psutil
from threadpoolctl import ThreadpoolController

from tlcapture.errors import NoSpaceError
from tlcapture.runs.display import Display
from tlcapture.runs.processes import n_processors
from tlcapture.runs.report import CollectingReport, Done
from tlcapture.runs.run import Run

Job = Callable[[Run], object]
_SWITCH = "TLCAPTURE_WRITERS"  # the number of threads; 0 does everything in the caller's thread
_MOST_WRITERS = 8
_SHARE = 0.125  # of free memory that jobs may hold
_MOST_BYTES = 4 * 2**30
# Seconds after which a thread gives way. The model's thread asks for its turn after each kernel that it launches, and
# may wait for each writer: by Python's default of 5 ms, 200 launches beside seven busy threads took 15 s on a machine
# with a GPU, and 0.6 s with this; the threads did as much work.
_TURN = 2e-4
_ENOUGH_FOR_TWO = 2**16  # numbers from which on torch sums with two threads


class _Ended(NamedTuple):
    done: Done
    error: BaseException | None


class BackgroundWriter:
    """Does jobs in other threads, and reports to the run what they wrote and what failed.

    Each thread computes alone: teams with more threads than processors wait for each other.

    As a context manager it finishes everything that was submitted before the context ends, even after an error. If
    that wait is interrupted, jobs that have not begun are dropped.

    Args:
        n_writers: the number of threads; `None` means one per two processors, and one to wait for each process.
        n_processes: the number of processes that do part of the jobs.
        most_bytes: the memory that unfinished jobs may hold; `None` means a share of the free memory.
    """

    def __init__(self, run: Run, n_writers: int | None = None, most_bytes: int | None = None, *, n_processes: int = 0):
        self._run = run
        self._n_writers = _n_writers(n_processes) if n_writers is None else n_writers
        self._most_bytes = _most_bytes() if most_bytes is None else most_bytes
        self._pool = ThreadPoolExecutor(
            max(1, self._n_writers), "writer", initializer=partial(_compute_alone, with_idle_team=n_processes > 0)
        )
        self._submitted: deque[Future[_Ended]] = deque()
        self._n_bytes = 0  # that jobs which have not ended hold
        self._freed = Condition()
        self._is_full = False  # the device, so that no job need begin

    def __enter__(self) -> BackgroundWriter:
        self._limits = _libraries().limit(limits=1, user_api="blas")  # of NumPy, whose threads wait in loops too
        self._turn = sys.getswitchinterval()
        if self._n_writers:
            sys.setswitchinterval(min(self._turn, _TURN))
        return self

    def __exit__(self, *error: object) -> None:
        try:
            wait(self._submitted)
        finally:
            sys.setswitchinterval(self._turn)
            self._limits.restore_original_limits()
            self._pool.shutdown(wait=False, cancel_futures=True)
            self.collect()

    def submit(self, job: Job, n_bytes: int = 0) -> None:
        """Let a thread do a job, after waiting until the memory that jobs hold allows for it.

        Args:
            job: gets a run to report to; a later call of the writer raises its error in the caller's thread.
            n_bytes: the memory that the job holds. A single job may exceed the limit.

        Raises:
            NoSpaceError: the device is full; no further files can be written.
        """
        with self._freed:
            self._freed.wait_for(lambda: not self._n_bytes or self._n_bytes + n_bytes <= self._most_bytes)
        self.collect()
        if not self._n_writers:
            self._add([self._do(job)])
            return
        future = self._pool.submit(self._do, job)
        self._submitted.append(future)
        self._hold(n_bytes)
        future.add_done_callback(lambda _: self._hold(-n_bytes))

    def collect(self) -> None:
        """Report jobs that have ended, in the order of their submission, up to the first that is still running."""
        ended = []
        while self._submitted and self._submitted[0].done():
            future = self._submitted.popleft()
            if not future.cancelled():
                ended.append(future.result())
        self._add(ended)

    def _hold(self, n_bytes: int) -> None:
        with self._freed:
            self._n_bytes += n_bytes
            self._freed.notify()

    def _do(self, job: Job) -> _Ended:
        """Do a job, whose files are reported even if it ends with an error."""
        report = CollectingReport(self._run.layout.folder, whole_remembers=self._run.report.remembers)
        error: BaseException | None = None
        try:
            if not self._is_full:
                job(Run(self._run.layout, report, Display()))
        except BaseException as found:
            error = found
            self._is_full |= isinstance(found, NoSpaceError)
        return _Ended(report.drain(), error)

    def _add(self, ended: list[_Ended]) -> None:
        for each in ended:
            self._run.add(each.done)
        errors = [each.error for each in ended if each.error is not None]
        if errors:
            raise errors[0]


def _compute_alone(*, with_idle_team: bool) -> None:
    """Let a thread compute alone.

    An idle team of threads makes libgomp count more threads than processors. Then none of them waits for its next work
    in a loop of milliseconds, in which the model's threads would keep other processes from computing.
    """
    import torch

    if with_idle_team:
        torch.zeros(_ENOUGH_FOR_TWO).add_(1)
    torch.get_num_threads()  # torch chooses the number for a thread when it first needs it
    _libraries().limit(limits=1, user_api="openmp")


def _libraries() -> ThreadpoolController:
    """The libraries that compute with several threads."""
    import torch  # noqa: F401  whose libraries are among them

    return _libraries_of(len(sys.modules))


@lru_cache(1)
def _libraries_of(n_modules: int) -> ThreadpoolController:
    """They are looked for again only after an import: that takes a while, in which the GIL is held."""
    return ThreadpoolController()


def _n_writers(n_processes: int) -> int:
    """The number of threads in `TLCAPTURE_WRITERS`, or one per two processors: the model needs some too."""
    if (asked := os.environ.get(_SWITCH, "")).isdecimal():
        return int(asked)
    return max(1, min(_MOST_WRITERS, n_processors() // 2)) + n_processes


def _most_bytes() -> int:
    return min(_MOST_BYTES, int(_SHARE * psutil.virtual_memory().available))
