"""Other Python processes for work that would keep this one from computing: statistics and JSON, which hold the GIL.

A process takes a second to start; until then the work is done here. It ends when its input ends, so also when this
process is killed. `multiprocessing` is not used, because it runs the user's own script again in each process.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from tlcapture.storage.remote.roots import in_other_processes
from tlcapture.text import first_line

Result = TypeVar("Result")

_SWITCH = "TLCAPTURE_PROCESSES"  # the number of processes, to which all work goes from the beginning
_MOST = 4
_WORTH_WHILE = 400  # prompts, divided by the number of processors
_SMALL = 10_000_000  # weights of a model's layers
# Teams of threads in several processes would wait for each other; writer threads compute alone too, for the same bits.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_BUFFER = 2**20  # bytes; with the usual 8 KB, an answer is read in many pieces, and the GIL is waited for after each
_PATIENCE = 10  # seconds until a process that does not end is killed
# The modules are those that this process would import, whatever the current folder holds.
_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from tlcapture.runs.processes import serve; serve()"
_log = logging.getLogger(__name__)


class Processes:
    """Processes that are started once enough prompts were announced to be worthwhile.

    Example:
        processes = Processes.of_context()
        processes.announce(1000)
        processes.call(len, "abc")  # in another process if one is ready
    """

    @staticmethod
    def of_context() -> Processes:
        """Those that `starting_early` is starting, or new ones."""
        return _EARLY.get() or Processes()

    def __init__(self) -> None:
        asked = os.environ.get(_SWITCH, "")
        self._is_asked_for = asked.isdecimal()
        self._count = int(asked) if self._is_asked_for else min(_MOST, n_processors() // 2)
        self._n_prompts = 0
        self._started: list[_Process] = []
        self._free: SimpleQueue[_Process] = SimpleQueue()
        weakref.finalize(self, _end, self._started)

    def __len__(self) -> int:
        """The number of processes, including those that are still starting."""
        return len(self._started)

    def announce(self, n_prompts: int) -> None:
        """Start the processes if there is work for them."""
        self._n_prompts += n_prompts
        if self._started or not (self._is_asked_for or self._n_prompts * n_processors() >= _WORTH_WHILE):
            return
        try:
            while len(self._started) < self._count:
                self._started.append(_Process())
        except OSError as error:
            _log.warning("a process that writes files cannot be started: %s", error.strerror)
            self._count = len(self._started)
        for each in self._started:
            Thread(target=_make_ready, args=(each, self._free), daemon=True).start()

    def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """The result of a module's function for picklable arguments, called in a process if one is ready, else here."""
        if not any(each.is_usable or self._is_asked_for for each in self._started):
            return function(*args)
        process = self._next()
        if process is None:
            return function(*args)
        try:
            return process.call(function, *args) if process.is_usable else function(*args)
        except _ProcessEndedError:
            _log.warning("a process that writes files ended: its work is done in this one")
            return function(*args)
        finally:
            self._free.put(process)

    def _next(self) -> _Process | None:
        """A process that is free, waited for once all have started; `None` if others are still starting."""
        is_starting = any(each.is_starting for each in self._started)
        with suppress(Empty):
            return self._free.get(block=self._is_asked_for or not is_starting)
        return None


@contextmanager
def starting_early(n_prompts: int) -> Iterator[None]:
    """Let processes start while something else takes time, as loading a model, if so many prompts are worth them.

    They end with the context unless `Processes.of_context` gave them to somebody, whom they are left to.
    """
    processes = Processes()
    if n_prompts:
        processes.announce(n_prompts)
    token = _EARLY.set(processes if processes else None)
    del processes
    try:
        yield
    finally:
        _EARLY.reset(token)


class _ProcessEndedError(Exception):
    pass


class _Process:
    """A process that calls one function after another."""

    def __init__(self) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=_BUFFER,
            start_new_session=True,  # Ctrl-C is for this process alone
            env={**os.environ, **_ONE_THREAD, **in_other_processes()},
        )
        self.is_starting = True
        self.is_usable = False
        self.is_ending = False

    def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """Raises what the function raises, and `_ProcessEndedError` if the process has ended."""
        assert self._popen.stdin is not None and self._popen.stdout is not None
        pickled = pickle.dumps((function, args))
        try:
            self._popen.stdin.write(pickled)
            self._popen.stdin.flush()
            result, error = pickle.load(self._popen.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            self.is_usable = False
            raise _ProcessEndedError("it has ended") from None
        except BaseException:  # the next call would read this one's answer
            self.is_usable = False
            raise
        if error is not None:
            raise error
        return result

    def end_soon(self) -> None:
        """Let the process end; kill it if it is still starting, or if nobody waits for its work."""
        assert self._popen.stdin is not None
        self.is_ending = True
        if not self.is_usable:
            self._popen.kill()
        with suppress(OSError):  # it has ended already
            self._popen.stdin.close()

    def end(self) -> None:
        """Wait until the process has ended, after `end_soon`."""
        assert self._popen.stdout is not None
        try:
            self._popen.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._popen.stdout.close()


@contextmanager
def leaving_processors(n_processes: int, n_weights: int) -> Iterator[None]:
    """Let a small model compute with the threads that a number of other processes leave to it.

    Its products are so short that threads gain little (two take 0.8 of one's time at 8 million weights, 1.1 at 0.4
    million), and all of them wait for the one whose processor another process has.
    """
    import torch

    before = torch.get_num_threads()
    if n_processes and n_weights < _SMALL:
        torch.set_num_threads(max(1, min(before, n_processors() - n_processes)))
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def n_processors() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def serve() -> None:
    """Call functions as a process: their pickles come on standard input, results go to standard output."""
    requests, replies = os.fdopen(os.dup(0), "rb", _BUFFER), os.fdopen(os.dup(1), "wb", _BUFFER)
    os.dup2(2, 1)  # for what else is printed
    while True:
        try:
            function, args = pickle.load(requests)
        except EOFError:
            os._exit(0)  # without taking apart what was imported, which takes seconds where processors are slow
        result, failure = None, None
        try:
            result = function(*args)
        except Exception as error:
            failure = error
        try:
            replies.write(pickle.dumps((result, failure)))
            replies.flush()
        except BrokenPipeError:  # nobody waits for the answer any more
            os._exit(0)


def _make_ready(process: _Process, free: SimpleQueue[_Process]) -> None:
    try:
        process.call(_prepare)
        process.is_usable = True
    except Exception as error:
        if not process.is_ending:
            _log.warning("a process that writes files did not start: %s", first_line(error))
    finally:
        process.is_starting = False
        free.put(process)


def _prepare() -> None:
    """Import the modules that the work needs."""
    import tlcapture.traits.projections.projection  # noqa: F401


_EARLY: ContextVar[Processes | None] = ContextVar("early processes", default=None)


def _end(processes: list[_Process]) -> None:
    for each in processes:
        each.end_soon()
    for each in processes:
        each.end()
