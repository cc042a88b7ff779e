"""A worker that does each task with one function of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tlcapture.models.loading import Model, ModelOutline
from tlcapture.runs.executors import Executor
from tlcapture.runs.report import RunReport
from tlcapture.runs.reporter import Reporter
from tlcapture.storage.layout import Layout


@dataclass(frozen=True)
class Bench:
    """What a task is done with: the experiment, the model, the run's options, and whom to tell."""

    layout: Layout
    model: Model
    options: Any
    report: RunReport
    reporter: Reporter


class ModelWorker:
    """Does tasks by `function(bench, task)`; what goes wrong with one fails it by its name, `str(task)`."""

    def __init__(
        self,
        function: Callable[[Bench, Any], None],
        options: Any,
        layout: Layout,
        load: Callable[[], Model] | None,
        report: RunReport,
        reporter: Reporter,
    ):
        self._function = function
        self._options = options
        self._layout = layout
        self._load = load
        self._report = report
        self._reporter = reporter

    def prepare(self) -> None:
        _ = self._bench

    def do(self, task: Any) -> None:
        with self._report.attempt(str(task)):
            self._function(self._bench, task)

    @cached_property
    def _bench(self) -> Bench:
        assert self._load is not None
        return Bench(self._layout, self._load(), self._options, self._report, self._reporter)


def known_of(load: Any, executor: Executor) -> tuple[Model | ModelOutline, Any]:
    """What is known of the model before the work, and how workers load it: here it is loaded now, elsewhere by them."""
    if not executor.is_local:
        return load.outline, load
    model = load()
    return model, lambda: model
