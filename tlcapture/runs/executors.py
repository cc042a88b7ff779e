"""Executors carry out the work of a run: in this process, or on a Ray cluster (`tlcapture/cluster/executor.py`).

A run describes how a worker is made and what its tasks are. A worker does one task after another, with the same
code wherever it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tlcapture.runs.run import Run
from tlcapture.storage.experiments.layout import Layout

if TYPE_CHECKING:
    from tlcapture.models.loading import Model, ModelOutline
    from tlcapture.runs.model_loader import ModelLoader

Load = Callable[[], "Model"]
Make = Callable[[Run, "Load | None"], "Worker"]


class Worker(Protocol):
    """Does tasks, writes their files and reports to its run."""

    def prepare(self) -> None:
        """Load the data that every task needs."""

    def do(self, task: Any) -> None:
        """Do one of the tasks of the run's `Work`."""


@dataclass(frozen=True)
class Work:
    """The tasks of a run, and how a worker does them.

    Attributes:
        make: makes a worker from a run and a function that loads the model; can be pickled.
        model: the loader of the model; `None` where the tasks need no model.
        tasks: can be done in any order, by any number of workers; `str` gives their names in messages.
        size: the size of a task, in units of `unit`.
        split: splits a task into tasks of at most the given number of prompts, to share it among workers.
        reads: other experiments that the tasks read.
        inputs: the files that a task reads, apart from vectors and the experiment's config.
        overwrite: replace files that cannot be read, too.
    """

    make: Make
    model: ModelLoader | None
    tasks: Sequence[Any]
    size: Callable[[Any], int]
    unit: str
    split: Callable[[Any, int], Sequence[Any]] = lambda task, most: [task]
    reads: Sequence[Layout] = ()
    inputs: Callable[[Any], Sequence[Path]] = lambda task: ()
    overwrite: bool = False

    @property
    def total(self) -> int:
        """The size of all tasks."""
        return sum(map(self.size, self.tasks))

    def share(self, count: int) -> int:
        """The number of prompts of each of `count` equal parts of the work; at least 1."""
        n_prompts = sum(len(self.split(task, 1)) for task in self.tasks)
        return max(1, -(-n_prompts // count))

    def pieces(self, most: int) -> list[Any]:
        """All tasks in parts of at most `most` prompts, the largest first."""
        return sorted((part for task in self.tasks for part in self.split(task, most)), key=self.size, reverse=True)

    def halves(self, task: Any) -> Sequence[Any]:
        """A task in two halves; a task of a single prompt stays as it is."""
        n_prompts = len(self.split(task, 1))
        return self.split(task, (n_prompts + 1) // 2)


class Executor(Protocol):
    """Carries out work and reports the results to a run."""

    def known_model(self, load: ModelLoader) -> Model | ModelOutline:
        """The model's measures and tokenizer, before any work is done.

        This is the model itself if this process does the work, and otherwise only its outline, since each worker
        loads the model.
        """

    def run(self, work: Work, run: Run) -> None:
        """Do all tasks, and report written files and failures to `run`."""


class LocalExecutor:
    """Does the work in this process."""

    def known_model(self, load: ModelLoader) -> Model:
        """The model itself, which the worker then uses too."""
        return load()

    def run(self, work: Work, run: Run) -> None:
        """Do one task after another in this process."""
        worker = work.make(run, work.model)
        for number, task in enumerate(work.tasks, start=1):
            run.display.task(number, len(work.tasks))
            worker.do(task)
