"""The workers of a Ray cluster that share the work of a run: started, replaced when they die, shut down at the end."""

from __future__ import annotations

import secrets
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from tlcapture.cluster.actor import WorkerActor, WorkerLocation
from tlcapture.cluster.collecting import experiment_inputs
from tlcapture.errors import InputError, StorageError
from tlcapture.runs.executors import Work
from tlcapture.storage.layout import Layout
from tlcapture.storage.locks import locked


class Stage(Enum):
    """The stages of a worker's start, in order; the values are shown in the progress line."""

    STARTING = "starting"
    CHECKING_MODEL = "looking for the model"
    RECEIVING_MODEL = "receiving the model"
    PREPARING = "loading"
    READY = "ready"


@dataclass(frozen=True)
class Cluster:
    """The cluster to use and the resources of each worker.

    Attributes:
        address: of a running cluster; `None` starts one on this machine.
        workers: their number; `None` for as many as fit.
        collect: whether workers that do not see the root send their files back.
    """

    address: str | None = None
    workers: int | None = None
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    collect: bool = False


@dataclass
class Batch:
    """A part of the work that one worker does, and the number of times that a worker died while doing it."""

    task: Any
    label: str
    tries: int = 0


@dataclass
class WorkerHandle:
    """A worker as the driver sees it.

    Attributes:
        number: its number in the pool, which a worker that replaces it takes over.
        actor: the Ray actor.
        pending: the Ray reference of the result that is awaited, if any.
        batch: the batch that it works on.
        counted: the units of work that were counted when its state was last read.
        since: when it was given its batch, on the monotonic clock.
    """

    number: int
    actor: Any
    stage: Stage = Stage.STARTING
    pending: Any = None
    batch: Batch | None = None
    location: WorkerLocation | None = None
    counted: int = 0
    since: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"worker {self.number}" + (f" on {self.location.node}" if self.location else "")


class Probe:
    """A temporary file in the root, which tells whether a worker sees the root, and whether the driver is there.

    The driver holds its lock, which the operating system releases when the driver ends.
    """

    def __init__(self, root: Path):
        self.path = root.resolve() / f".tlcapture-{secrets.token_hex(8)}"
        self.content = secrets.token_bytes(16)
        self._lock = ExitStack()

    def __enter__(self) -> Probe:
        try:
            self._lock.enter_context(locked(self.path))
            self.path.write_bytes(self.content)
        except (OSError, StorageError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{self.path.parent}: cannot be written to: {reason}") from None
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self.path.unlink()
        self._lock.close()


class WorkerPool:
    """A fixed number of workers; one that dies can be replaced."""

    def __init__(self, ray: Any, work: Work, layout: Layout, cluster: Cluster, probe: Probe, size: int):
        self.ray = ray
        self._cluster = cluster
        self._probe = probe
        threads = max(1, int(cluster.cpus_per_worker))
        load = None if work.model is None else work.model.silent()
        self._files = None if work.model is None else work.model.files()
        inputs = ray.put(experiment_inputs([layout, *work.reads])) if cluster.collect else None
        self._arguments = (_absolute(layout), work.make, work.unit, load, self._files, threads, inputs)
        self._actor_class = ray.remote(
            num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker, max_concurrency=2, max_restarts=0
        )(WorkerActor)
        self.workers = [self._start(number) for number in range(size)]

    def _start(self, number: int) -> WorkerHandle:
        worker = WorkerHandle(number, self._actor_class.remote(*self._arguments))
        worker.pending = worker.actor.locate.remote(self._probe.path, self._probe.content)
        return worker

    @cached_property
    def model_contents(self) -> dict[str, Any]:
        """References of the model's files in the object store, where they are put when a first worker needs them."""
        assert self._files is not None
        return {name: self.ray.put(self._files.send(name)) for name in self._files.sizes}

    def replace(self, worker: WorkerHandle) -> None:
        """Start another worker in place of one that died."""
        self.workers[self.workers.index(worker)] = self._start(worker.number)

    def check(self, location: WorkerLocation) -> None:
        """Raise `InputError` for a worker that does not see the root and does not send its files back either."""
        if not location.sees_root and not self._cluster.collect:
            raise InputError(
                f"a worker on {location.node} does not see {self._probe.path.parent}: give a --root that all nodes of "
                "the cluster share, or pass --collect to have files sent back"
            )

    @property
    def collects(self) -> bool:
        """Whether workers send their files back."""
        return self._cluster.collect

    def shutdown(self) -> None:
        """End all workers."""
        for worker in self.workers:
            with suppress(Exception):  # the worker may be dead, and the cluster gone
                self.ray.kill(worker.actor)


def _absolute(layout: Layout) -> Layout:
    return Layout(layout.root.resolve(), layout.experiment)
