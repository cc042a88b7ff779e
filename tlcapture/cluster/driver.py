"""The driver's loop: pieces of work go to the workers of a Ray cluster until all are done, even where workers die.

Ray starts a worker that died again and calls it once more (`max_restarts`, `max_task_retries`). A piece that killed its
worker twice is halved, so that what is at fault is found and fails by name.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

from tlcapture.cluster.actor import Result, Shared, WorkerActor
from tlcapture.cluster.board import Board
from tlcapture.errors import ClusterError, InputError, TlcaptureError
from tlcapture.logger import get_logger
from tlcapture.runs.display import Progress
from tlcapture.runs.executors import Work
from tlcapture.runs.received_files import file_contents, store_outputs
from tlcapture.runs.run import Run
from tlcapture.text import first_line

_log = get_logger(__name__)

_POLL = 0.5  # seconds between two readings of the board
_TRIES = 3  # deaths of a worker on one prompt after which the prompt counts as failed
_MOST_DEATHS = 10  # in a row, beyond one for each worker
_SILENCE = 30  # seconds after which a worker that waits for a node loses its piece to one that is idle
_TIMEOUT = 300  # seconds for a first worker to start, and for workers to finish their current prompt


@dataclass(eq=False)
class _Piece:
    """A part of the work that one worker does, and how many workers died of what it is a half of."""

    number: int
    task: Any
    label: str
    died_before: int = 0


@dataclass(eq=False)
class _Worker:
    """A worker as the driver sees it: Ray's actor, the reference of what it was called for, and its name.

    Times are those of the monotonic clock: when it was last called, heard of, and found dead.
    """

    number: int
    actor: Any
    name: str
    call: Any = None
    piece: _Piece | None = None
    process: int | None = None
    called: float = 0.0
    heard: float = 0.0
    died: float = -1.0

    @property
    def is_idle(self) -> bool:
        return self.call is None and self.heard > self.died


class Driver:
    """Gives pieces of work to workers until all are done."""

    def __init__(self, ray: Any, shared: Shared, tasks: Sequence[Any], work: Work, run: Run, progress: Progress):
        self._ray, self._shared, self._work, self._run, self._progress = ray, shared, work, run, progress
        self._numbers = count()
        self._waiting = deque(self._piece(task) for task in tasks)
        self._n_pieces, self._n_done, self._n_units = len(tasks), 0, 0
        self._deaths = 0  # since the last piece that was done
        self._model: dict[str, Any] = {}  # references of the model's files, once a worker lacks them
        self._workers: list[_Worker] = []
        self._started = self._read = time.monotonic()
        self._began: float | None = None

    def run(self, n_workers: int, **resources: float) -> None:
        """Do all pieces; records the workers and for how long they worked, without their start.

        Raises:
            InputError: no worker starts, or a worker does not see the root.
            ClusterError: too many workers die in a row.
            TlcaptureError: an error in a worker that ends the run; what other workers did until then is kept.
        """
        ray, shared = self._ray, self._ray.put(self._shared)
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self._board = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(
            Board
        ).remote()
        actor = ray.remote(max_restarts=-1, max_task_retries=1, **resources)(WorkerActor)
        try:
            for number in range(n_workers):
                worker = _Worker(number, actor.remote(shared, number, self._board), f"worker {number}")
                self._workers.append(worker)
                self._call(worker, None)
            while self._waiting or any(worker.piece for worker in self._workers):
                self._step()
        except (KeyboardInterrupt, TlcaptureError):
            self._stop_workers()
            raise
        finally:
            for each in [self._board, *(worker.actor for worker in self._workers)]:
                with suppress(Exception):  # it may be dead, and the cluster gone
                    ray.kill(each)
        seconds = 0.0 if self._began is None else round(time.monotonic() - self._began, 3)
        facts = {"workers": n_workers, "gpus_per_worker": resources["num_gpus"], "pieces": self._n_pieces}
        self._run.display.uses(cluster={**facts, "seconds": seconds})

    def _piece(self, task: Any, died_before: int = 0) -> _Piece:
        return _Piece(next(self._numbers), task, self._work.label(task), died_before)

    def _step(self) -> None:
        calls = {worker.call: worker for worker in self._workers if worker.call is not None}
        for call in self._ray.wait(list(calls), timeout=_POLL)[0] if calls else []:
            self._receive(calls[call])
        for worker in self._workers:
            if self._waiting and worker.is_idle:
                self._call(worker, self._waiting.popleft())
        time.sleep(0 if calls else _POLL)
        if time.monotonic() - self._read >= _POLL:
            self._read_board()

    def _call(self, worker: _Worker, piece: _Piece | None) -> None:
        """Let a worker do a piece, or prepare for those to come."""
        worker.piece, worker.called = piece, time.monotonic()
        if piece is None:
            worker.call = worker.actor.prepare.remote(self._model)
            return
        self._began = self._began or worker.called
        _log.debug("%s, process %s, takes %s", worker.name, worker.process, piece.label)
        sends = self._shared.inputs is not None
        inputs = file_contents(self._run.layout, self._work.inputs(piece.task)) if sends else {}
        do = worker.actor.do.options(max_task_retries=int(not piece.died_before))
        worker.call = do.remote(piece.number, piece.label, piece.task, inputs, self._model)

    def _receive(self, worker: _Worker) -> None:
        call, worker.call, piece, worker.piece = worker.call, None, worker.piece, None
        try:
            result: Result = self._ray.get(call)
        except self._ray.exceptions.RayTaskError:  # a fault of the program, not of the cluster
            raise
        except self._ray.exceptions.RayError as error:
            self._died(worker, piece, error)
            return
        worker.name, worker.process, worker.heard = result.worker, result.process, time.monotonic()
        if result.lacks_model and (files := self._shared.files) is not None:
            self._model = self._model or {name: self._ray.put(files.send(name)) for name in files.sizes}
            self._call(worker, piece)
            return
        self._keep(result)
        if result.error is not None:
            raise result.error
        if piece is not None:
            self._n_done, self._deaths = self._n_done + 1, 0
            seconds = time.monotonic() - worker.called
            rate = f"{result.done.n_tokens / seconds:.0f} tokens/s, " if result.done.n_tokens else ""
            done = f"{worker.name}: {piece.label}, {rate}{self._n_done} of {self._n_pieces} batches"
            self._progress.advance(done=done, share=self._n_done / self._n_pieces)

    def _keep(self, result: Result) -> None:
        done = result.done
        if result.files is not None:
            done = store_outputs(self._run.layout, result.files, done, overwrite=self._work.overwrite)
        self._run.add(done)

    def _died(self, worker: _Worker, piece: _Piece | None, error: Exception) -> None:
        """Put the piece of a worker that died back into the queue, in two halves if it killed its worker twice."""
        _log.warning("%s died: %s", worker.name, first_line(error))
        worker.died, self._deaths = time.monotonic(), self._deaths + 1
        if isinstance(error, self._ray.exceptions.ActorDiedError):  # for good: it cannot start, or was given up
            self._workers.remove(worker)
        if not self._workers or self._deaths > _MOST_DEATHS + len(self._workers):
            raise ClusterError(f"{self._deaths} workers died in a row, the last one with: {first_line(error)}")
        if piece is None:
            return
        died = piece.died_before + self._ray.get(self._board.died.remote(piece.number))
        n_prompts = self._work.n_prompts(piece.task)
        if died < _TRIES - 1 or (n_prompts == 1 and died < _TRIES):
            self._waiting.appendleft(piece)
        elif n_prompts == 1:
            self._run.failed(piece.label, f"its worker died {died} times: {first_line(error)}")
        else:
            self._run_again(worker.name, piece.label)
            halves = self._work.split(piece.task, (n_prompts + 1) // 2)
            self._n_pieces += len(halves) - 1
            self._waiting.extendleft(self._piece(half, _TRIES - 2) for half in halves)

    def _run_again(self, name: str, label: str) -> None:
        self._run.report.retried.append(label)
        self._run.line(f"{name} died; its batch is run again: {label}")

    def _read_board(self) -> None:
        news, now = self._ray.get(self._board.read.remote()), time.monotonic()
        self._read = now
        for name, label in news.again:
            self._run_again(name, label)
        for worker in self._workers:
            worker.heard = max(worker.heard, now - news.silent.get(worker.number, now))
        if now - max(self._started, *(worker.heard for worker in self._workers)) > _TIMEOUT:
            raise InputError(f"no worker of the Ray cluster has answered for {_TIMEOUT} s")
        if not self._waiting and any(worker.is_idle for worker in self._workers):
            for worker in self._workers:
                if worker.piece is not None and now - worker.heard > _SILENCE:
                    self._ray.kill(worker.actor)
        self._run.display.uses(**news.facts)
        self._progress.state(f"{self._run.report.n_prompts} prompts done; {news.doing}")
        self._progress.advance(news.units - self._n_units)
        self._n_units = news.units

    def _stop_workers(self) -> None:
        """Let every worker finish its current prompt, and keep what it did."""
        answering = [worker for worker in self._workers if time.monotonic() - worker.heard < _SILENCE]
        calls = [worker.call for worker in answering if worker.piece is not None]
        with suppress(self._ray.exceptions.RayError):
            self._ray.get(self._board.stop.remote(), timeout=_SILENCE)
        for call in self._ray.wait(calls, num_returns=len(calls), timeout=_TIMEOUT)[0] if calls else []:
            with suppress(self._ray.exceptions.RayError):
                self._keep(self._ray.get(call))
