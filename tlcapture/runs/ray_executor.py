"""Work on a Ray cluster: pieces of it go to workers as they come free, and again to others where one dies.

Needs the extra `ray`. Every worker loads the model once; the driver loads no weights. Results are those of
a local run in the same batches: each piece is a batch of prompts of like lengths.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tlcapture.errors import ClusterError, InputError, TlcaptureError
from tlcapture.layout import Layout
from tlcapture.runs.collecting import contents_of, given_files, place
from tlcapture.runs.executors import Work
from tlcapture.runs.ray_actor import Result, State, WorkerActor
from tlcapture.runs.report import Progress, Reporter, RunReport

_log = logging.getLogger(__name__)

# How far a worker is that has just started.
_SEES, _LACKS_MODEL, _TAKES_MODEL, _PREPARES, _READY = "sees", "lacks model", "takes model", "prepares", "ready"
_POLL = 0.5  # seconds between two looks at the workers
_TRIES = 3  # how often a piece of work is given out before it counts as failed
_PIECES_PER_WORKER = 2  # at least so many, so that no worker ends long before the others
_MOST_PROMPTS = {"cpu": 16, "gpu": 64}  # in a piece, where no batch size is asked for
_MOST_DEATHS = 10  # in a row, beyond one for each worker
_PATIENCE_TO_CONNECT = 10  # seconds
_PATIENCE = 300  # seconds for the first worker to start


@dataclass(frozen=True)
class Cluster:
    """How the cluster is asked for: `address` of one that runs (`None` starts one here), and what a worker takes."""

    address: str | None = None
    workers: int | None = None
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    collect: bool = False


@dataclass
class _Piece:
    """A part of the work, and how often it was given out."""

    task: Any
    label: str
    tries: int = 0


@dataclass
class _Member:
    """A worker: its actor, what it has in hand, and how far it was when it was last looked at."""

    number: int
    actor: Any
    stage: str = "sees"
    waiting_for: Any = None
    piece: _Piece | None = None
    state: State | None = None
    counted: int = 0
    since: float = field(default_factory=time.monotonic)


class RayExecutor:
    """Does work by the workers of a cluster."""

    is_local = False

    def __init__(self, cluster: Cluster, batch_size: int | None = None):
        self._cluster = cluster
        self._batch_size = batch_size

    def run(self, work: Work, report: RunReport, reporter: Reporter) -> None:
        """Do the work.

        Raises:
            InputError: there is no cluster, it is too small for a worker, or a worker does not see the root.
        """
        if not work.tasks:
            return
        with self._connected() as ray:
            n_workers = self._n_workers(ray)
            pieces = self._pieces(work, n_workers)
            with _Probe(work.layout.root) as probe:
                crew = _Crew(ray, work, self._cluster, probe, min(n_workers, len(pieces)))
                reporter.line(f"{len(pieces)} pieces of work for {len(crew.members)} workers of a Ray cluster")
                with reporter.progress(sum(map(work.size, work.tasks)), "Ray", work.unit) as progress:
                    try:
                        _Shift(crew, pieces, work, report, reporter, progress).run()
                    finally:
                        crew.dismiss()

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        try:
            import ray
        except ImportError:
            raise InputError('--executor ray needs Ray: run pip install "tlcapture[ray]"') from None
        started = not ray.is_initialized()
        if started:
            _check_reachable(self._cluster.address)
            options: dict[str, Any] = {"address": self._cluster.address, "log_to_driver": False}
            if self._cluster.address is None:
                needed = (self._cluster.workers or os.cpu_count() or 1) * self._cluster.cpus_per_worker
                options |= {"num_cpus": int(needed + 0.999), "include_dashboard": False}
            try:
                ray.init(logging_level=logging.ERROR, **options)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise InputError(f"no Ray cluster at {self._cluster.address!r}: {_first_line(error)}") from None
        try:
            yield ray
        finally:
            if started:
                ray.shutdown()

    def _n_workers(self, ray: Any) -> int:
        there, cluster = ray.cluster_resources(), self._cluster
        fits = int(there.get("CPU", 0) // cluster.cpus_per_worker) if cluster.cpus_per_worker else 1_000_000
        if cluster.gpus_per_worker:
            fits = min(fits, int(there.get("GPU", 0) // cluster.gpus_per_worker))
        if not fits:
            raise InputError(
                f"the Ray cluster has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs: too few for a "
                f"worker of {cluster.cpus_per_worker:g} and {cluster.gpus_per_worker:g}"
            )
        return min(cluster.workers or fits, fits)

    def _pieces(self, work: Work, n_workers: int) -> deque[_Piece]:
        """Batches of the size asked for, or as large as leaves every worker enough of them; the largest first."""
        most = self._batch_size
        if most is None:
            usual = _MOST_PROMPTS["gpu" if self._cluster.gpus_per_worker else "cpu"]
            fewest = n_workers * _PIECES_PER_WORKER
            n_prompts = sum(len(work.split(task, 1)) for task in work.tasks)
            most = max(1, min(usual, -(-n_prompts // fewest)))
        parts = [part for task in work.tasks for part in work.split(task, most)]
        return deque(_Piece(part, work.label(part)) for part in sorted(parts, key=work.size, reverse=True))


class _Probe:
    """A file in the root that every worker must see."""

    def __init__(self, root: Path):
        self.path = root.resolve() / f".tlcapture-{secrets.token_hex(8)}"
        self.content = secrets.token_bytes(16)

    def __enter__(self) -> _Probe:
        try:
            self.path.write_bytes(self.content)
        except OSError as error:
            raise InputError(f"{self.path.parent}: cannot be written to: {error.strerror}") from None
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self.path.unlink()


class _Crew:
    """The workers there are; one that dies is replaced."""

    def __init__(self, ray: Any, work: Work, cluster: Cluster, probe: _Probe, size: int):
        self.ray = ray
        self._cluster = cluster
        self._probe = probe
        threads = max(1, int(cluster.cpus_per_worker))
        load = None if work.model is None else work.model.silent()
        self._files = None if work.model is None else work.model.files()
        given = ray.put(given_files([work.layout, *work.reads])) if cluster.collect else None
        self._arguments = (_absolute(work.layout), work.make, work.unit, load, self._files, threads, given)
        self._kind = ray.remote(
            num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker, max_concurrency=2, max_restarts=0
        )(WorkerActor)
        self.members = [self._start(number) for number in range(size)]

    def _start(self, number: int) -> _Member:
        member = _Member(number, self._kind.remote(*self._arguments))
        member.waiting_for = member.actor.sees.remote(self._probe.path, self._probe.content)
        return member

    @cached_property
    def model_contents(self) -> dict[str, Any]:
        """The model's files, put into the object store when a first worker lacks them."""
        assert self._files is not None
        return {name: self.ray.put(self._files.send(name)) for name in self._files.sizes}

    def replace(self, member: _Member) -> None:
        self.members[self.members.index(member)] = self._start(member.number)

    def check(self, node: str, sees: bool) -> None:
        """Raise `InputError` for a worker that would write where nobody looks."""
        if not sees and not self._cluster.collect:
            raise InputError(
                f"a worker on {node} does not see {self._probe.path.parent}: give a --root that all nodes of the "
                "cluster share, or pass --collect to have files sent back"
            )

    @property
    def collects(self) -> bool:
        return self._cluster.collect

    def dismiss(self) -> None:
        for member in self.members:
            with suppress(Exception):  # it may be dead, and the cluster gone
                self.ray.kill(member.actor)


class _Shift:
    """Gives out pieces until all are done."""

    def __init__(
        self, crew: _Crew, pieces: deque[_Piece], work: Work, report: RunReport, reporter: Reporter, progress: Progress
    ):
        self._crew = crew
        self._ray = crew.ray
        self._pieces = pieces
        self._work = work
        self._report = report
        self._reporter = reporter
        self._progress = progress
        self._n_pieces = len(pieces)
        self._n_done = 0
        self._began: float | None = None
        self._deaths = 0  # since the last piece that was done
        self._last_ready = time.monotonic()

    def run(self) -> None:
        """Give out all pieces; tells the reporter for how long workers were at work, their start apart."""
        try:
            while self._pieces or any(member.piece for member in self._crew.members):
                self._step()
            seconds = 0.0 if self._began is None else time.monotonic() - self._began
            cluster = {"workers": len(self._crew.members), "pieces": self._n_pieces, "seconds": round(seconds, 3)}
            self._reporter.uses(cluster=cluster)
        except BaseException as reason:
            if isinstance(reason, KeyboardInterrupt | TlcaptureError):
                self._wind_up()
            raise

    def _step(self) -> None:
        waiting = {member.waiting_for: member for member in self._crew.members if member.waiting_for is not None}
        ready, _ = self._ray.wait(list(waiting), num_returns=1, timeout=_POLL)
        for reference in ready:
            self._take(waiting[reference], reference)
        self._give_out()
        self._look()
        if not any(member.stage == _READY for member in self._crew.members):
            if time.monotonic() - self._last_ready > _PATIENCE:
                raise InputError(f"no worker of the Ray cluster has started within {_PATIENCE} s")

    def _take(self, member: _Member, reference: Any) -> None:
        """Take what a worker hands over: that it sees the root, or the result of a piece."""
        member.waiting_for = None
        piece, member.piece = member.piece, None
        try:
            value = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            self._bury(member, piece, error)
            return
        if piece is None:
            self._welcome(member, value)
            return
        self._accept(member, piece, value)

    def _welcome(self, member: _Member, said: Any) -> None:
        """Take a worker in, step by step: it sees the root, it has the model's files, it has loaded the model."""
        actor, stage = member.actor, member.stage
        if stage == _SEES:
            self._crew.check(*said)
            member.stage, member.waiting_for = _LACKS_MODEL, actor.lacks_model.remote()
        elif stage == _LACKS_MODEL and said:
            member.stage, member.waiting_for = _TAKES_MODEL, actor.take_model.remote(self._crew.model_contents)
        elif stage in (_LACKS_MODEL, _TAKES_MODEL):
            member.stage, member.waiting_for = _PREPARES, actor.prepare.remote()
        elif said is not None:
            raise said
        else:
            member.stage = _READY
            self._last_ready = time.monotonic()

    def _accept(self, member: _Member, piece: _Piece, result: Result) -> None:
        self._keep(result)
        if result.error is not None:
            raise result.error
        self._n_done += 1
        self._deaths = 0
        seconds = time.monotonic() - member.since
        rate = f"{result.done.n_tokens / seconds:.0f} tokens/s, " if result.done.n_tokens else ""
        where = member.state.node if member.state else "?"
        self._progress.advance(
            done=f"worker {member.number} on {where}: {piece.label}, {rate}{self._n_done} of {self._n_pieces} pieces"
        )

    def _keep(self, result: Result) -> None:
        done = result.done
        if result.files is not None:
            done = place(self._work.layout, result.files, done)
        self._report.add(done, self._reporter)

    def _bury(self, member: _Member, piece: _Piece | None, error: Exception) -> None:
        """Replace a worker that died, and put what it had in hand back: as it was, or in halves where it died twice."""
        _log.warning("worker %d died: %s", member.number, _first_line(error))
        self._deaths += 1
        if self._deaths > _MOST_DEATHS + len(self._crew.members):
            raise ClusterError(f"{self._deaths} workers died in a row, the last one so: {_first_line(error)}")
        self._crew.replace(member)
        if piece is None:
            return
        piece.tries += 1
        n_prompts = len(self._work.split(piece.task, 1))
        if piece.tries >= _TRIES and n_prompts == 1:
            self._report.failed(piece.label, f"its worker died {piece.tries} times: {_first_line(error)}")
            return
        self._report.retried.append(piece.label)
        self._reporter.line(f"worker {member.number} died; its work is run again: {piece.label}")
        if piece.tries < _TRIES - 1 or n_prompts == 1:
            self._pieces.appendleft(piece)
            return
        halves = self._work.split(piece.task, (n_prompts + 1) // 2)
        self._n_pieces += len(halves) - 1
        self._pieces.extendleft(_Piece(half, self._work.label(half), _TRIES - 2) for half in halves)

    def _give_out(self) -> None:
        for member in self._crew.members:
            if member.stage == _READY and member.waiting_for is None and self._pieces:
                self._began = self._began or time.monotonic()
                member.piece = self._pieces.popleft()
                member.since = time.monotonic()
                task = member.piece.task
                given = contents_of(self._work.layout, self._work.inputs(task)) if self._crew.collects else {}
                member.waiting_for = member.actor.do.remote(task, given)

    def _look(self) -> None:
        """Count what workers have done since the last look."""
        asked = [(member, member.actor.state.remote()) for member in self._crew.members if member.stage == _READY]
        for member, reference in asked:
            with suppress(self._ray.exceptions.RayError):
                member.state = state = self._ray.get(reference, timeout=_POLL)
                self._reporter.uses(**state.facts)
                self._progress.advance(state.units - member.counted)
                member.counted = state.units
        self._progress.advance()

    def _wind_up(self) -> None:
        """Have every worker finish the prompt in hand, and keep what they did."""
        busy: Sequence[_Member] = [member for member in self._crew.members if member.piece is not None]
        with suppress(self._ray.exceptions.RayError):
            self._ray.get([member.actor.stop.remote() for member in busy], timeout=_PATIENCE)
            for result in self._ray.get([member.waiting_for for member in busy], timeout=_PATIENCE):
                self._keep(result)


def _check_reachable(address: str | None) -> None:
    """Raise `InputError` where nobody listens: Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return  # one is started here, or Ray finds it by itself
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE_TO_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"no Ray cluster at {address!r}: {error}: start one with 'ray start --head'") from None


def _absolute(layout: Layout) -> Layout:
    return Layout(layout.root.resolve(), layout.experiment)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
