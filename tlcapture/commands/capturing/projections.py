"""The projections of a capture run: all of new captures, and the missing ones of saved captures."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor

from tlcapture.captures.capture import Capture
from tlcapture.commands.capturing.options import CaptureOptions
from tlcapture.commands.projecting.projections import (
    ChanceLevels,
    ProjectionTask,
    project_capture,
    report_choice,
    scores_among,
    without_projection,
)
from tlcapture.commands.prompt_files.known_files import PromptFiles
from tlcapture.commands.prompt_files.outputs import Outputs
from tlcapture.commands.prompt_files.records import CaptureRecord
from tlcapture.errors import InputError
from tlcapture.models.loading import Model
from tlcapture.runs.processes import Processes
from tlcapture.runs.run import Run
from tlcapture.traits.choice import ChosenVector, ChosenVectors, Subject, VectorChooser
from tlcapture.views.kept_tokens import Positions

NOTHING_KEPT = "--projections-only: no trait has a vector that fits, so nothing would be kept"


class CaptureProjections:
    """Projects captures onto the vectors that are chosen for them; several threads may use it at a time."""

    def __init__(self, options: CaptureOptions, run: Run, processes: Processes):
        self.options = options
        self._run = run
        self._processes = processes
        self._chosen: list[ChosenVectors] = []  # choices that were not reported yet
        self._chooser = VectorChooser(run.layout, options.vectors, on_chosen=self._chosen.append)
        self._levels = ChanceLevels(run)
        self._lock = Lock()
        self._last_pickled: tuple[Sequence[ChosenVector], bytes] = ((), b"")

    def check_vectors(self, model: Model, wanted: Outputs) -> None:
        """Raise `InputError` before prompts run if no vector fits, so that nothing would be kept of them."""
        will_be = CaptureRecord.of_model(model, wanted.kept, attn_out=wanted.attn_out)
        if not any(self._vectors(self._run, will_be, component) for component in self.options.components):
            raise InputError(NOTHING_KEPT)

    def are_finished(self, files: PromptFiles) -> bool:
        """Whether a saved capture already has all its projections; `False` unless only missing files are written."""
        if not self.options.skip_existing:
            return False
        if not self.options.projects:
            return True
        capture = files.capture()
        return capture is not None and not any(
            without_projection(files, self._vectors(self._run, capture, component), self.options.existing)
            for component in capture.components
        )

    def make(
        self,
        run: Run,
        capture: Capture,
        *,
        files: PromptFiles | None = None,
        with_metadata: bool = False,
        kept: Positions | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Project a capture; if its `files` are given, only onto vectors without a projection there.

        The other arguments are those of `project_capture`; `device` is the device of a new capture's model.
        """
        if not self.options.project:
            return
        for component in capture.prompt.residual.components:
            chosen = vectors = self._vectors(run, capture, component)
            if files is not None:
                vectors = without_projection(files, chosen, self.options.existing)
            if not vectors:
                continue
            scores = scores_among(capture, chosen, vectors, device)
            has_whole_file = kept is None or kept.is_all  # which another process reads
            if device is not None and has_whole_file and not with_metadata:
                self._project_elsewhere(run, capture, vectors, scores)
                continue
            overwrite, form = self.options.overwrite, self.options.parts.form
            project_capture(
                run,
                capture,
                vectors,
                self._levels.reporting_to(run),
                with_metadata=with_metadata,
                overwrite=overwrite,
                kept=kept,
                scores=scores,
                form=form,
            )

    def _vectors(self, run: Run, subject: Subject, component: str) -> Sequence[ChosenVector]:
        """The vectors for a capture; a new choice is reported on `run`."""
        with self._lock:
            vectors = self._chooser.vectors(subject, component)
            while self._chosen:
                report_choice(run, self._chosen.pop())
        return vectors

    def _pickled(self, chosen: Sequence[ChosenVector]) -> bytes:
        """Pickled vectors for a task; all new captures share them."""
        vectors, pickled = self._last_pickled
        if vectors is not chosen:
            pickled = pickle.dumps(chosen)
            self._last_pickled = chosen, pickled
        return pickled

    def _project_elsewhere(
        self, run: Run, capture: Capture, chosen: Sequence[ChosenVector], scores: Sequence[Tensor]
    ) -> None:
        """Let another process write the projections of a capture, whose file it reads."""
        overwrite, form = self.options.overwrite, self.options.parts.form
        raw = run.layout.residual(capture.capture_set, capture.name)
        values = [each.numpy(force=True) for each in scores]
        task = ProjectionTask(run.layout, raw, self._pickled(chosen), values, overwrite, run.report.remembers, form)
        done, error = self._processes.call(ProjectionTask.do, task)
        run.add(done)
        if error is not None:
            raise error
