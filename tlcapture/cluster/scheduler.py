"""Distributing batches of work to the workers of a Ray cluster until all are done, even where workers die."""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from typing import Any

from tlcapture.cluster.actor import Result
from tlcapture.cluster.collecting import file_contents, store_outputs
from tlcapture.cluster.pool import Batch, Stage, WorkerHandle, WorkerPool
from tlcapture.errors import ClusterError, InputError, TlcaptureError
from tlcapture.logger import get_logger
from tlcapture.runs.display import Progress
from tlcapture.runs.executors import Work
from tlcapture.runs.run import Run
from tlcapture.text import first_line

_log = get_logger(__name__)

_POLL = 0.5  # seconds between two reads of the workers' states
_TRIES = 3  # deaths of a worker on one batch after which the batch counts as failed
_MOST_DEATHS = 10  # in a row, beyond one for each worker
_START_TIMEOUT = 300  # seconds for the first worker to start
_STOP_TIMEOUT = 300  # seconds for workers to finish their current prompt


class Scheduler:
    """Gives batches to the workers of a pool until all are done."""

    def __init__(self, pool: WorkerPool, batches: deque[Batch], work: Work, run: Run, progress: Progress):
        self._pool = pool
        self._ray = pool.ray
        self._batches = batches
        self._work = work
        self._run = run
        self._progress = progress
        self._n_batches = len(batches)
        self._n_done = 0
        self._began: float | None = None
        self._deaths = 0  # since the last batch that was done
        self._last_ready = time.monotonic()

    def run(self) -> None:
        """Do all batches; records the number of workers and for how long they worked, without their start.

        Raises:
            InputError: no worker starts, or a worker does not see the root.
            ClusterError: too many workers die in a row.
            TlcaptureError: an error in a worker that ends the run; what other workers did until then is kept.
        """
        try:
            while self._batches or any(worker.batch for worker in self._pool.workers):
                self._step()
            seconds = 0.0 if self._began is None else time.monotonic() - self._began
            cluster = {"workers": len(self._pool.workers), "pieces": self._n_batches, "seconds": round(seconds, 3)}
            self._run.display.uses(cluster=cluster)
        except BaseException as reason:
            if isinstance(reason, KeyboardInterrupt | TlcaptureError):
                self._stop_workers()
            raise

    def _step(self) -> None:
        pending = {worker.pending: worker for worker in self._pool.workers if worker.pending is not None}
        ready, _ = self._ray.wait(list(pending), num_returns=1, timeout=_POLL)
        for reference in ready:
            self._receive(pending[reference], reference)
        self._assign()
        self._read_states()
        if not any(worker.stage is Stage.READY for worker in self._pool.workers):
            if time.monotonic() - self._last_ready > _START_TIMEOUT:
                raise InputError(f"no worker of the Ray cluster has started within {_START_TIMEOUT} s")

    def _receive(self, worker: WorkerHandle, reference: Any) -> None:
        """Handle what a worker returns: the result of a batch, or of a stage of its start."""
        worker.pending = None
        batch, worker.batch = worker.batch, None
        try:
            value = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            self._replace(worker, batch, error)
            return
        if batch is None:
            self._continue_start(worker, value)
            return
        self._complete(worker, batch, value)

    def _continue_start(self, worker: WorkerHandle, value: Any) -> None:
        """Begin the next stage of a worker's start: locate it, look for the model's files, send them, load the model.

        `value` is what the last stage returned.
        """
        actor, stage = worker.actor, worker.stage
        if stage is Stage.STARTING:
            self._pool.check(value)
            worker.location = value
            worker.stage, worker.pending = Stage.CHECKING_MODEL, actor.needs_model.remote()
        elif stage is Stage.CHECKING_MODEL and value:
            worker.stage, worker.pending = Stage.RECEIVING_MODEL, actor.receive_model.remote(self._pool.model_contents)
        elif stage in (Stage.CHECKING_MODEL, Stage.RECEIVING_MODEL):
            worker.stage, worker.pending = Stage.PREPARING, actor.prepare.remote()
        elif value is not None:
            raise value
        else:
            worker.stage = Stage.READY
            self._last_ready = time.monotonic()

    def _complete(self, worker: WorkerHandle, batch: Batch, result: Result) -> None:
        self._keep(result)
        if result.error is not None:
            raise result.error
        self._n_done += 1
        self._deaths = 0
        seconds = time.monotonic() - worker.since
        rate = f"{result.done.n_tokens / seconds:.0f} tokens/s, " if result.done.n_tokens else ""
        done = f"{worker}: {batch.label}, {rate}{self._n_done} of {self._n_batches} batches"
        self._progress.advance(done=done, share=self._n_done / self._n_batches)

    def _keep(self, result: Result) -> None:
        done = result.done
        if result.files is not None:
            done = store_outputs(self._run.layout, result.files, done, overwrite=self._work.overwrite)
        self._run.add(done)

    def _replace(self, worker: WorkerHandle, batch: Batch | None, error: Exception) -> None:
        """Replace a worker that died and put its batch back into the queue, in two halves if this was its second."""
        _log.warning("%s died: %s", worker, first_line(error))
        self._deaths += 1
        if self._deaths > _MOST_DEATHS + len(self._pool.workers):
            raise ClusterError(f"{self._deaths} workers died in a row, the last one with: {first_line(error)}")
        self._pool.replace(worker)
        if batch is None:
            return
        batch.tries += 1
        n_prompts = len(self._work.split(batch.task, 1))
        if batch.tries >= _TRIES and n_prompts == 1:
            self._run.failed(batch.label, f"its worker died {batch.tries} times: {first_line(error)}")
            return
        self._run.report.retried.append(batch.label)
        self._run.line(f"{worker} died; its batch is run again: {batch.label}")
        if batch.tries < _TRIES - 1 or n_prompts == 1:
            self._batches.appendleft(batch)
            return
        halves = self._work.split(batch.task, (n_prompts + 1) // 2)
        self._n_batches += len(halves) - 1
        self._batches.extendleft(Batch(half, self._work.label(half), _TRIES - 2) for half in halves)

    def _assign(self) -> None:
        """Give a batch to each worker that is ready and idle."""
        for worker in self._pool.workers:
            if worker.stage is Stage.READY and worker.pending is None and self._batches:
                self._began = self._began or time.monotonic()
                worker.batch = self._batches.popleft()
                worker.since = time.monotonic()
                process = worker.location.process if worker.location else None
                _log.debug("%s, process %s, takes %s", worker, process, worker.batch.label)
                task = worker.batch.task
                inputs = file_contents(self._run.layout, self._work.inputs(task)) if self._pool.collects else {}
                worker.pending = worker.actor.do.remote(task, inputs)

    def _read_states(self) -> None:
        """Count what workers have done since their states were last read."""
        states = [(worker, worker.actor.state.remote()) for worker in self._pool.workers if worker.stage is Stage.READY]
        for worker, reference in states:
            with suppress(self._ray.exceptions.RayError):
                state = self._ray.get(reference, timeout=_POLL)
                self._run.display.uses(**state.facts)
                self._progress.advance(state.units - worker.counted)
                worker.counted = state.units
        doing = (
            f"{each.number}: {each.batch.label if each.batch else each.stage.value}" for each in self._pool.workers
        )
        self._progress.state(f"{self._run.report.n_prompts} prompts done; {', '.join(doing)}")
        self._progress.advance()

    def _stop_workers(self) -> None:
        """Let every worker finish its current prompt, and keep what it did."""
        busy = [worker for worker in self._pool.workers if worker.batch is not None]
        with suppress(self._ray.exceptions.RayError):
            self._ray.get([worker.actor.stop.remote() for worker in busy], timeout=_STOP_TIMEOUT)
            for result in self._ray.get([worker.pending for worker in busy], timeout=_STOP_TIMEOUT):
                self._keep(result)
