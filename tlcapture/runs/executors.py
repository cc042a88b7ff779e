"""Who does the work of a run: this process, or (`tlcapture/cluster/executor.py`) workers of a Ray cluster.

A run says how a worker is made and what its tasks are. A worker does one task after the other, with
the very same code wherever it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tlcapture.runs.report import RunReport
from tlcapture.runs.reporter import Reporter
from tlcapture.storage.layout import Layout

if TYPE_CHECKING:
    from tlcapture.runs.model_loader import ModelLoader

Make = Callable[[Layout, "ModelLoader | None", RunReport, Reporter], "Worker"]


class Worker(Protocol):
    """Does tasks, writes their files and tells its report."""

    def prepare(self) -> None:
        """Load what every task needs."""

    def do(self, task: Any) -> None: ...


@dataclass(frozen=True)
class Work:
    """What there is to do.

    Attributes:
        layout: the experiment that the work is in.
        make: makes a worker for an experiment, with a loader of the model, that tells a report and a reporter; it
            can be sent to another process.
        model: loads the model, where one is needed.
        tasks: may be done in any order, by any number of workers.
        size: of a task, in `unit`s.
        split: a task in smaller ones of at most so many prompts, where more workers than one share the work.
        label: what a task is, for people.
        reads: other experiments that are read.
        inputs: files that a task reads, besides vectors and what describes the experiment.
    """

    layout: Layout
    make: Make
    model: ModelLoader | None
    tasks: Sequence[Any]
    size: Callable[[Any], int]
    unit: str
    label: Callable[[Any], str]
    split: Callable[[Any, int], Sequence[Any]] = lambda task, most: [task]
    reads: Sequence[Layout] = ()
    inputs: Callable[[Any], Sequence[Path]] = lambda task: ()


class Executor(Protocol):
    """Does work, and tells a report what came of it."""

    @property
    def is_local(self) -> bool:
        """Whether the work is done in this process, by a model that is loaded here."""

    def run(self, work: Work, report: RunReport, reporter: Reporter) -> None: ...


class LocalExecutor:
    """Does the work here and now."""

    is_local = True

    def run(self, work: Work, report: RunReport, reporter: Reporter) -> None:
        worker = work.make(work.layout, work.model, report, reporter)
        for task in work.tasks:
            worker.do(task)
