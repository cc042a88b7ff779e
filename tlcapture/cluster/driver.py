"""The driver's loop: pieces of work go to the workers of a Ray cluster until all are done, even where workers die.

Ray starts a worker that died again and calls it once more (`max_restarts`, `max_task_retries`). A piece that killed its
worker twice is halved until the prompt at fault is found, which fails by name.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from tlcapture.cluster.actor import Result, Shared, WorkerActor
from tlcapture.cluster.board import Board
from tlcapture.errors import ClusterError, InputError, TlcaptureError
from tlcapture.runs.executors import Work
from tlcapture.runs.received_files import file_contents, store_outputs
from tlcapture.runs.run import Run
from tlcapture.storage.locks import presence
from tlcapture.storage.temporary_files import remove_temporaries
from tlcapture.text import first_line

_log = logging.getLogger(__name__)

_POLL = 0.5  # seconds, the most between two readings of the board
_TRIES = 3  # deaths of a worker on one prompt after which the prompt counts as failed
_MOST_DEATHS = 10  # in a row, beyond one for each worker
_SILENCE = 60  # seconds until a worker that is not heard of loses its piece to an idle one; none if its node is dead
_TIMEOUT = 300  # seconds for a first worker to start, and for workers to finish their current prompt


@dataclass(eq=False)
class _Piece:
    """A part of the work that one worker does, and how many of its workers died."""

    task: Any
    label: str
    number: int = field(default_factory=count().__next__)
    died: int = 0


@dataclass(eq=False)
class _Worker:
    """A worker as the driver sees it: Ray's actor, when it was last heard of, and when it was found dead."""

    number: int
    actor: Any
    name: str
    process: int = 0
    heard: float = field(default_factory=time.monotonic)
    died: float = -1.0


class Driver:
    """Gives pieces of work to workers until all are done."""

    def __init__(self, ray: Any, work: Work, tasks: Sequence[Any], run: Run):
        self._ray, self._work, self._run = ray, work, run
        self._waiting = deque(self._piece(task) for task in tasks)
        self._workers: list[_Worker] = []
        self._calls: dict[Any, tuple[_Worker, _Piece | None]] = {}  # by the reference of what will be answered
        self._model: dict[str, Any] = {}  # references of the model's files, once a worker lacks them
        self._n_pieces, self._n_done, self._deaths = len(tasks), 0, 0  # deaths in a row
        self._began: float | None = None
        self._any_died = False

    def run(self, n_workers: int, resources: dict[str, float], *, collect: bool) -> None:
        """Do all pieces; records the workers and for how long they worked, without their start.

        Raises:
            InputError: no worker starts, or a worker does not see the root.
            ClusterError: too many workers die in a row.
            TlcaptureError: an error in a worker that ends the run; what other workers did until then is kept.
        """
        ray, work, run = self._ray, self._work, self._run
        board, self._board = Board.start(ray)
        how = {"num_cpus": resources["CPU"], "num_gpus": resources["GPU"]}
        actor = ray.remote(max_restarts=-1, max_task_retries=1, **how)(WorkerActor)
        with presence(run.layout.root) as file, run.progress(work.total, "Ray", work.unit) as self._progress:
            self._shared = Shared.of(work, run.layout, file, int(resources["CPU"]), collect=collect)
            self._reference = [ray.put(self._shared)]
            try:
                for n in range(n_workers):
                    self._workers.append(_Worker(n, actor.remote(n, board), f"worker {n}"))
                    self._call(self._workers[-1], None)
                while self._waiting or any(piece for _, piece in self._calls.values()):
                    self._step()
                self._read_board()
                writers = ray.get(self._board.writers.remote()) if self._any_died else ()
            except (KeyboardInterrupt, TlcaptureError):
                self._stop_workers()
                raise
            finally:
                for each in [self._board, *(worker.actor for worker in self._workers)]:
                    with suppress(Exception):  # it may be dead, and the cluster gone
                        ray.kill(each)
        # What workers were writing when they died; one that still runs, on a lost node, changes no file any more.
        if writers:
            remove_temporaries(run.layout.folder, writers)
        seconds = 0.0 if self._began is None else round(time.monotonic() - self._began, 3)
        facts = {"workers": n_workers, "gpus_per_worker": resources["GPU"], "pieces": self._n_pieces}
        run.display.uses(cluster={**facts, "seconds": seconds})

    def _piece(self, task: Any) -> _Piece:
        return _Piece(task, str(task))

    def _step(self) -> None:
        time.sleep(0 if self._calls else _POLL)
        for call in self._ray.wait(list(self._calls), timeout=_POLL)[0] if self._calls else ():
            self._receive(call, *self._calls.pop(call))
        for worker in self._idle()[: len(self._waiting)]:
            self._call(worker, self._waiting.popleft())
        self._read_board()

    def _idle(self) -> list[_Worker]:
        busy = [worker for worker, _ in self._calls.values()]
        return [worker for worker in self._workers if worker not in busy and worker.heard > worker.died]

    def _call(self, worker: _Worker, piece: _Piece | None) -> None:
        """Let a worker do a piece, or prepare for its first one."""
        if piece is None:
            self._calls[worker.actor.prepare.remote(self._reference, self._model)] = worker, None
            return
        self._began = self._began or time.monotonic()
        _log.debug("%s, process %s, takes %s", worker.name, worker.process, piece.label)
        inputs = file_contents(self._run.layout, self._work.inputs(piece.task)) if self._shared.sends_back else {}
        do = worker.actor.do.options(max_task_retries=int(not piece.died))
        call = do.remote(piece.number, piece.label, piece.task, inputs, self._reference, self._model)
        self._calls[call] = worker, piece

    def _receive(self, call: Any, worker: _Worker, piece: _Piece | None) -> None:
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
            done = f"{worker.name}: {piece.label}, {result.rate}{self._n_done} of {self._n_pieces} batches"
            self._progress.advance(done=done, share=self._n_done / self._n_pieces)

    def _keep(self, result: Result) -> None:
        done, files = result.done, result.files
        self._run.add(done if files is None else store_outputs(self._run.layout, files, done, self._work.overwrite))

    def _died(self, worker: _Worker, piece: _Piece | None, error: Exception) -> None:
        """Put the piece of a worker that died back into the queue, in two halves if it killed its worker twice."""
        _log.warning("%s died: %s", worker.name, first_line(error))
        self._any_died, worker.died, self._deaths = True, time.monotonic(), self._deaths + 1
        if isinstance(error, self._ray.exceptions.ActorDiedError):  # for good: it cannot start, or was given up
            self._workers.remove(worker)
        if not self._workers or self._deaths > _MOST_DEATHS + len(self._workers):
            raise ClusterError(f"{self._deaths} workers died in a row, the last one with: {first_line(error)}")
        if piece is None:
            return
        piece.died = self._ray.get(self._board.begun.remote(piece.number))
        halves = self._work.halves(piece.task)
        if piece.died < (_TRIES if len(halves) == 1 else _TRIES - 1):
            self._waiting.appendleft(piece)
        elif len(halves) == 1:
            self._run.failed(piece.label, f"its worker died {piece.died} times: {first_line(error)}")
        else:
            self._run.again(worker.name, piece.label)
            self._n_pieces += len(halves) - 1
            self._waiting.extendleft(map(self._piece, halves))

    def _read_board(self) -> None:
        news, now = self._ray.get(self._board.read.remote()), time.monotonic()
        self._any_died = self._any_died or bool(news.again)
        for name, label in news.again:
            self._run.again(name, label)
        for worker in self._workers:
            worker.heard = max(worker.heard, now - news.silent.get(worker.number, now))
        if now - max(worker.heard for worker in self._workers) > _TIMEOUT:
            raise InputError(f"no worker of the Ray cluster has answered for {_TIMEOUT} s")
        for worker, piece in self._calls.values() if self._idle() and not self._waiting else ():
            if piece is not None and (worker.number in news.gone or now - worker.heard > _SILENCE):
                self._ray.kill(worker.actor)
        self._run.display.uses(**news.facts)
        self._progress.state(f"{self._run.report.n_prompts} prompts done; {news.doing}")
        self._progress.advance(news.units)

    def _stop_workers(self) -> None:
        """Let every worker finish its current prompt, and keep what it did."""
        now = time.monotonic()
        calls = [call for call, (worker, piece) in self._calls.items() if piece and now - worker.heard < _SILENCE]
        with suppress(self._ray.exceptions.RayError):
            self._ray.get(self._board.stop.remote(), timeout=_SILENCE)
        for call in self._ray.wait(calls, num_returns=len(calls), timeout=_TIMEOUT)[0] if calls else ():
            with suppress(self._ray.exceptions.RayError):
                self._keep(self._ray.get(call))
