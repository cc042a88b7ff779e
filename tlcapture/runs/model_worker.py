"""A worker that calls one function for each task, with the run and the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from tlcapture.models.loading import Model
from tlcapture.runs.run import Run


class ModelWorker:
    """Calls `function(run, model, options, task)` for each task; failures are reported under `str(task)`."""

    def __init__(
        self,
        function: Callable[[Run, Model, Any, Any], None],
        options: Any,
        run: Run,
        load: Callable[[], Model] | None,
    ):
        self._function = function
        self._options = options
        self._run = run
        self._load = load

    def prepare(self) -> None:
        """Load the model."""
        _ = self._model

    def do(self, task: Any) -> None:
        """Do a task; a `TlcaptureError` is reported to the run and does not stop it."""
        with self._run.attempt(str(task)):
            self._function(self._run, self._model, self._options, task)

    @cached_property
    def _model(self) -> Model:
        assert self._load is not None
        return self._load()
