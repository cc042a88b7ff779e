"""Carrying out the tasks of a capture: generating from fresh prompts, and completing saved captures.

While a prompt's files are being written, a marker file is stored next to them. A killed run leaves the marker, and the
next run captures that prompt again. It does not complete the prompt from its stored activations, which are rounded, so
that the files are those of an uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch

from tlcapture.captures.capture import Capture
from tlcapture.captures.from_generation import capture_of
from tlcapture.captures.provenance import dropped_warning, no_answer_warning
from tlcapture.commands.capture_outputs import Outputs, add_ons, remove_stale, saved_capture, write_capture
from tlcapture.commands.capture_records import CaptureRecord
from tlcapture.commands.capture_tasks import CaptureOptions, CaptureTask
from tlcapture.commands.projections import ChanceLevels, project_capture, vector_chooser, without_projection
from tlcapture.errors import InputError
from tlcapture.generation.checkpoint_sampling import sampling_for, unfollowed
from tlcapture.generation.loop import generate, teacher_force
from tlcapture.generation.outcomes import Failure, Generation
from tlcapture.generation.sampling import Sampling
from tlcapture.models.loading import Model
from tlcapture.models.memory import is_out_of_memory, release_memory
from tlcapture.prompts.template_args import has_switch
from tlcapture.runs.background_writer import BackgroundWriter
from tlcapture.runs.existing_files import check_replaceable
from tlcapture.runs.run import Run
from tlcapture.storage.config import update_config
from tlcapture.storage.files import remove, write_bytes
from tlcapture.storage.layout import derived_files


class CaptureWorker:
    """Carries out tasks with a model that is loaded when it is first needed."""

    def __init__(
        self,
        options: CaptureOptions,
        run: Run,
        load: Callable[[], Model] | None,
    ):
        self.run = run
        self.layout = run.layout
        self.options = options
        self._load = load
        self._chooser = vector_chooser(run, options.vectors)
        self._levels = ChanceLevels(run)
        self._removed: list[Path] = []
        self._unanswered: list[str] = []

    @cached_property
    def model(self) -> Model:
        """The model, loaded on first use."""
        assert self._load is not None
        return self._load()

    def prepare(self) -> None:
        """Load the model."""
        _ = self.model

    def do(self, task: CaptureTask) -> None:
        """Capture the fresh prompts of a task and complete its saved ones."""
        if task.fresh:
            try:
                self._generate(task)
            finally:
                self.run.removed(self._removed)
                if self._unanswered:
                    can_be_off = has_switch(self.model.tokenizer, task.batched[0].template_args)
                    self.run.warn(no_answer_warning(self._unanswered, has_switch=can_be_off))
                self._removed, self._unanswered = [], []
        self._complete(task)

    @contextmanager
    def _attempt(self, name: str) -> Iterator[None]:
        """Work on one prompt, whose failure, including lack of memory, does not stop the run."""
        try:
            with self.run.attempt(name):
                yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.run.failed(name, "out of memory: the outputs for this prompt do not fit in memory")
            release_memory()

    # -- fresh prompts ----------------------------------------------------------------------------

    def _generate(self, task: CaptureTask) -> None:
        model, options = self.model, self.options
        wanted = options.outputs(model.n_layers)
        sampling = sampling_for(options.sampling, model)
        not_followed = unfollowed(sampling, model)
        if not_followed is not None:
            self.run.warn(not_followed)
        # A default that is longer for thinking must not keep prompts from fitting.
        max_new_tokens = max(options.max_new_tokens, min(task.max_new_tokens, model.n_ctx - task.longest))
        for prompt in task.batched:
            if prompt.dropped:
                self.run.warn(dropped_warning(prompt.dropped))
        if options.projections_only:
            self._check_vectors(wanted)
        total = len(task.fresh) * max_new_tokens
        with (
            self.run.progress(total, task.prompt_set.name, "token") as progress,
            BackgroundWriter(self.run) as writer,
        ):

            def on_tokens(count: int) -> None:
                self.run.report.n_tokens += count
                progress.advance(count)

            for outcome in generate(
                model,
                task.batched,
                wanted=task.fresh,
                hooks=wanted.live_hooks(model),
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                batch_size=options.batch_size,
                on_tokens=on_tokens,
            ):
                name = f"{outcome.prompt.prompt_set}/{outcome.prompt.id}"
                if isinstance(outcome, Failure):
                    self.run.failed(name, outcome.reason)
                    continue
                with self._attempt(name):
                    self._write(name, outcome, sampling, wanted, writer, max_new_tokens)
                progress.advance(
                    max_new_tokens - len(outcome.response_ids),
                    done=f"{name}: {len(outcome.response_ids)} tokens, {outcome.stop_reason}",
                )

    def _write(
        self,
        name: str,
        generation: Generation,
        sampling: Sampling,
        wanted: Outputs,
        writer: BackgroundWriter,
        max_new_tokens: int,
    ) -> None:
        options = self.options
        # Another tool may have put files there since the run was planned.
        where = (generation.prompt.prompt_set, generation.prompt.id)
        saved_capture(self.layout.residual(*where), overwrite=options.overwrite)
        for path in derived_files(self.layout, *where):
            check_replaceable(self.layout, path, overwrite=options.overwrite)
        capture = capture_of(
            generation,
            self.model,
            experiment=self.layout.experiment,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            attn_out=options.capture_attn,
            save_dtype=options.save_dtype,
            kept=wanted.kept,
        )
        if capture.lacks_answer:
            self._unanswered.append(name)
        marker = self.layout.unfinished(capture.prompt_set, capture.prompt_id)
        update_config(self.layout, inference_model=self.model.name)
        write_bytes(marker, b"")
        if wanted.raw:
            self.run.wrote(write_capture(self.layout, capture, self._removed.extend))
        else:
            self._removed += remove_stale(self.layout, capture)
        self._project(capture, only=not wanted.raw)
        cache = generation.cache
        files = add_ons(
            self.layout, capture, wanted, self.model, cache, residual_cache=cache, save_dtype=options.save_dtype
        )
        writer.write(name, files, then=lambda: remove([marker]))
        self.run.report.n_prompts += 1

    # -- saved captures --------------------------------------------------------------------------------

    def _complete(self, task: CaptureTask) -> None:
        prompt_set = task.prompt_set.name
        with self.run.progress(len(task.saved), f"{prompt_set}, saved", "prompt") as progress:
            for prompt_id, wanted in task.saved.items():
                name, report = f"{prompt_set}/{prompt_id}", self.run.report
                n_files, n_failures = report.n_files, len(report.failures)
                raw = self.layout.residual(prompt_set, prompt_id)
                if self.options.projections_only and not raw.is_file():
                    report.n_skipped += 1
                    continue
                with self._attempt(name):
                    self._replay(Capture.open(raw), wanted)
                if len(report.failures) == n_failures:
                    if report.n_files > n_files:
                        report.n_prompts += 1
                    else:
                        report.n_skipped += 1
                progress.advance(1, done=f"{name}: {report.n_files - n_files} files")

    def _replay(self, capture: Capture, wanted: Outputs) -> None:
        if wanted.needs_pass or wanted.logit_lens:
            self._check_model(capture)
            if wanted.logit_lens and not capture.kept.has_all_outputs:
                raise InputError(
                    f"the logit lens needs residual_out of every layer, but {capture.kept.described()}: "
                    "capture it again with --logit-lens"
                )
            hooks = wanted.pass_hooks(self.model)
            cache = teacher_force(self.model, capture.token_ids, hooks) if hooks else {}
            save_dtype = self.options.save_dtype
            if save_dtype == "auto" and capture.prompt.residual.points.dtype == torch.float32:
                save_dtype = "float32"  # as the capture was saved
            for write in add_ons(
                self.layout, capture, wanted, self.model, cache, residual_cache=None, save_dtype=save_dtype
            ):
                self.run.wrote(write())
        if not self.options.replay:
            self._project(capture, only_missing=self.options.skip_existing)

    def _check_model(self, capture: Capture) -> None:
        fingerprint = capture.metadata.get("model_fingerprint")
        if fingerprint != self.model.fingerprint:
            raise InputError(
                f"captured from {capture.metadata.get('inference_model')!r} (fingerprint {fingerprint}), not from "
                f"{self.model.name!r} ({self.model.fingerprint}): replay it with the same model"
            )

    # -- projection ---------------------------------------------------------------------------------------

    def _check_vectors(self, wanted: Outputs) -> None:
        """Raise `InputError` before prompts run if no vector fits, so that nothing would be kept of them."""
        will_be = CaptureRecord.of_model(self.model, wanted.kept, attn_out=wanted.attn_out)
        if not any(self._chooser.vectors(will_be, component) for component in self.options.components):
            raise InputError("--projections-only: no trait has a vector that fits, so nothing would be kept")

    def _project(self, capture: Capture, *, only_missing: bool = False, only: bool = False) -> None:
        if not self.options.project:
            return
        components = ["residual"] + (["attn_out"] if capture.prompt.residual.attn_out is not None else [])
        for component in components:
            vectors = self._chooser.vectors(capture, component)
            if only_missing:
                vectors = without_projection(self.layout, capture, vectors, self.options.existing)
            project_capture(self.run, capture, vectors, self._levels, only=only, overwrite=self.options.overwrite)
