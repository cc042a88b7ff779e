"""Who does the work of a run: this process, or (`tlcapture/cluster/executor.py`) workers of a Ray cluster.

A run says how a worker is made and what its tasks are. A worker does one task after the other, with
the same code wherever it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tlcapture.runs.run import Run
from tlcapture.storage.layout import Layout

if TYPE_CHECKING:
    from tlcapture.models.loading import Model, ModelOutline

Load = Callable[[], "Model"]
Make = Callable[[Run, "Load | None"], "Worker"]


class Worker(Protocol):
    """Does tasks, writes their files and reports to its run."""

    def prepare(self) -> None:
        """Load what every task needs."""

    def do(self, task: Any) -> None: ...


@dataclass(frozen=True)
class Work:
    """What there is to do.

    Attributes:
        make: makes a worker for a run, with a loader of the model; it can be sent to another process.
        model: loads the model, where one is needed.
        tasks: may be done in any order, by any number of workers.
        size: of a task, in `unit`s.
        split: a task in smaller ones of at most so many prompts, where more workers than one share the work.
        label: what a task is, for people.
        reads: other experiments that are read.
        inputs: files that a task reads, besides vectors and what describes the experiment.
    """

    make: Make
    model: Load | None
    tasks: Sequence[Any]
    size: Callable[[Any], int]
    unit: str
    label: Callable[[Any], str]
    split: Callable[[Any, int], Sequence[Any]] = lambda task, most: [task]
    reads: Sequence[Layout] = ()
    inputs: Callable[[Any], Sequence[Path]] = lambda task: ()


@dataclass(frozen=True)
class ModelAccess:
    """How a run gets at its model: what it asks before the work begins, and what loads it for a worker."""

    known: Callable[[], Model | ModelOutline]
    load: Load


class Executor(Protocol):
    """Does work, and reports to a run what came of it."""

    def model_access(self, load: Any) -> ModelAccess:
        """How the run gets at the model that `load` loads: where the work is done here, one model serves both
        purposes; elsewhere the outline is asked, and each worker loads its own."""

    def run(self, work: Work, run: Run) -> None: ...


class LocalExecutor:
    """Does the work in this process."""

    def model_access(self, load: Load) -> ModelAccess:
        once = cache(load)
        return ModelAccess(once, once)

    def run(self, work: Work, run: Run) -> None:
        worker = work.make(run, work.model)
        for task in work.tasks:
            worker.do(task)
