"""`tlcapture capture`: prompt sets through the model, into files.

    model, prompts -> generate -> one prompt after another: raw residual, projections, add-ons

With `skip_existing` each prompt gets just what it lacks; with `replay`, or where a prompt's raw
residual is there already, add-ons come from the saved capture and one teacher-forced pass.

While a prompt's files are being written a mark stands beside them. A run that was killed leaves it, and
the next one makes that prompt anew rather than complete it from what was stored, rounded, so that
it ends with what an undisturbed run would have written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial

from tlcapture.captures import Capture
from tlcapture.config import read_config, record
from tlcapture.errors import InputError, NoSpaceError, StorageError
from tlcapture.generation import Failure, Generation, generate, teacher_force
from tlcapture.layout import Layout
from tlcapture.logger import get_logger
from tlcapture.memory import is_out_of_memory, release_memory
from tlcapture.models import Model
from tlcapture.prompts import PromptSet
from tlcapture.runs.alone import alone
from tlcapture.runs.background import BackgroundWriter
from tlcapture.runs.estimate import Estimate, n_projections
from tlcapture.runs.executors import Executor, LocalExecutor, Work
from tlcapture.runs.loading import ModelLoader
from tlcapture.runs.outputs import Outputs, add_ons, capture_of, remove_stale, write_capture
from tlcapture.runs.planning import CaptureOptions, Plan, Planner
from tlcapture.runs.projected import ProjectedCapture
from tlcapture.runs.report import RunReport
from tlcapture.runs.reporter import Reporter
from tlcapture.runs.vectors import Chooser, project_capture, traits_to_project
from tlcapture.sizes import format_bytes
from tlcapture.storage import free_bytes, remove, sweep_temporaries, write_bytes

__all__ = ["CaptureOptions", "estimate_capture", "run_capture"]

_log = get_logger(__name__)


def run_capture(
    layout: Layout,
    prompt_sets: Sequence[PromptSet],
    options: CaptureOptions,
    load: ModelLoader,
    reporter: Reporter = Reporter(),
    executor: Executor = LocalExecutor(),
) -> RunReport:
    """Capture prompt sets into an experiment. The model is loaded only when something needs it.

    Raises:
        InputError: the request is wrong; nothing was written.
        NoSpaceError: what would be written is more than is free, or the device is full by now.
    """
    _check(layout, options)
    report = reporter.report(layout)
    worker = CaptureWorker(options, layout, load, report, reporter)
    known = (lambda: worker.model) if executor.is_local else (lambda: load.outline)
    planner = Planner(layout, options, read_config(layout), load.name, known)
    plans = planner.plans(prompt_sets)
    _check_space(Estimate.of(plans, layout, options, lambda: known().measures), layout)
    if layout.folder.exists():
        sweep_temporaries(layout.folder)
    for plan in plans:
        for what, reason in plan.refused:
            report.failed(what, reason)
    busy = {plan.prompt_set.name for plan in plans if plan.does_something or (plan.saved and options.project)}
    report.n_skipped += sum(len(plan.saved) for plan in plans if plan.prompt_set.name not in busy)
    with ExitStack() as stack:
        # In one order, so that no two runs wait for each other.
        locks = [alone(layout, f"captures of {name}", reporter, options.shard) for name in sorted(busy)]
        waited = [stack.enter_context(lock) for lock in locks]
        if any(waited):
            plans = planner.plans(prompt_sets)
        tasks = [plan for plan in plans if plan.prompt_set.name in busy]
        executor.run(
            Work(
                layout,
                (lambda *_: worker) if executor.is_local else partial(CaptureWorker, options),
                load,
                tasks,
                size=lambda plan: len(plan.fresh) * options.max_new_tokens,
                unit="token",
                label=Plan.label,
                split=Plan.split,
                reads=[options.vectors.layout(layout)],
                inputs=lambda plan: [layout.residual(plan.prompt_set.name, prompt_id) for prompt_id in plan.saved],
            ),
            report,
            reporter,
        )
    return report


def estimate_capture(
    layout: Layout, prompt_sets: Sequence[PromptSet], options: CaptureOptions, load: ModelLoader
) -> Estimate:
    """What `run_capture` would write, from the model's config and tokenizer alone; writes nothing."""
    _check(layout, options)
    outline = load.outline
    planner = Planner(layout, options, read_config(layout), load.name, lambda: outline)
    return Estimate.of(planner.plans(prompt_sets), layout, options, lambda: outline.measures)


def _check(layout: Layout, options: CaptureOptions) -> None:
    if options.replay and options.capture_attn:
        raise InputError("--replay keeps raw residuals as they are: attention outputs need a capture of their own")
    if options.replay and (options.layers or options.points):
        raise InputError("--replay keeps raw residuals as they are: --layers and --points need a capture of their own")
    if options.projections_only:
        _check_projections_only(layout, options)
    if layout.folder.exists() and not os.access(layout.folder, os.W_OK):
        raise StorageError(f"{layout.folder}: cannot be written to")
    if options.project and (options.vectors.experiment or options.vectors.traits):
        traits_to_project(layout, options.vectors)


def _check_projections_only(layout: Layout, options: CaptureOptions) -> None:
    if options.replay or not options.project:
        raise InputError("--projections-only keeps nothing but projections: leave out --replay and --no-project")
    if options.internals:
        raise InputError("--projections-only keeps no raw activations: leave out --layer-internals")
    if not n_projections(layout, options):
        source = options.vectors.layout(layout)
        raise InputError(
            f"--projections-only needs trait vectors, and experiment {source.experiment!r} has none: run "
            f"'tlcapture extract --experiment {source.experiment}' first"
        )


def _check_space(estimate: Estimate, layout: Layout) -> None:
    """Raise `NoSpaceError` where more would be written than is free, what is replaced counted as free."""
    free = free_bytes(layout.folder)
    _log.info("about %s will be written, %s are free", format_bytes(estimate.n_bytes), format_bytes(free))
    if estimate.n_bytes > free and estimate.n_bytes - estimate.replaced() > free:
        raise NoSpaceError(
            f"{layout.folder}: about {format_bytes(estimate.n_bytes)} would be written, "
            f"{format_bytes(free)} are free on its device (--dry-run shows the sum)"
        )


class CaptureWorker:
    """Carries out plans, with a model that is loaded when it is first needed."""

    def __init__(
        self,
        options: CaptureOptions,
        layout: Layout,
        load: Callable[[], Model] | None,
        report: RunReport,
        reporter: Reporter,
    ):
        self.layout = layout
        self.options = options
        self.reporter = reporter
        self.report = report
        self._load = load
        self._chooser = Chooser(layout, options.vectors, report, reporter)

    @cached_property
    def model(self) -> Model:
        assert self._load is not None
        return self._load()

    def prepare(self) -> None:
        _ = self.model

    def do(self, task: Plan) -> None:
        if task.fresh:
            self._generate(task)
        self._revisit(task)

    @contextmanager
    def _attempt(self, name: str) -> Iterator[None]:
        """Work on one prompt, whose failure stops no other prompt: that memory does not suffice too."""
        try:
            with self.report.attempt(name):
                yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.report.failed(name, "out of memory: what is wanted of this prompt does not fit on this device")
            release_memory()

    # -- fresh prompts ----------------------------------------------------------------------------

    def _generate(self, plan: Plan) -> None:
        model, options = self.model, self.options
        wanted = options.outputs(model.n_layers)
        if options.projections_only:
            self._check_vectors(wanted)
        total = len(plan.fresh) * options.max_new_tokens
        with (
            self.reporter.progress(total, plan.prompt_set.name, "token") as progress,
            BackgroundWriter(self.report) as writer,
        ):

            def on_tokens(count: int) -> None:
                self.report.n_tokens += count
                progress.advance(count)

            for outcome in generate(
                model,
                plan.company,
                wanted=plan.fresh,
                hooks=wanted.live_hooks(model),
                max_new_tokens=options.max_new_tokens,
                sampling=options.sampling,
                batch_size=options.batch_size,
                on_tokens=on_tokens,
            ):
                name = f"{outcome.prompt.prompt_set}/{outcome.prompt.id}"
                if isinstance(outcome, Failure):
                    self.report.failed(name, outcome.reason)
                    continue
                with self._attempt(name):
                    self._write(name, outcome, wanted, writer)
                progress.advance(
                    options.max_new_tokens - len(outcome.response_ids),
                    done=f"{name}: {len(outcome.response_ids)} tokens, {outcome.stop_reason}",
                )

    def _write(self, name: str, generation: Generation, wanted: Outputs, writer: BackgroundWriter) -> None:
        options = self.options
        capture = capture_of(
            generation,
            self.model,
            experiment=self.layout.experiment,
            sampling=options.sampling,
            max_new_tokens=options.max_new_tokens,
            attn_out=options.capture_attn,
            save_dtype=options.save_dtype,
            kept=wanted.kept,
        )
        mark = self.layout.unfinished(capture.prompt_set, capture.prompt_id)
        record(self.layout, inference_model=self.model.name)
        write_bytes(mark, b"")
        if wanted.raw:
            self.report.wrote(write_capture(self.layout, capture))
        else:
            remove_stale(self.layout, capture)
        self._project(capture, only=not wanted.raw)
        cache = generation.cache
        files = add_ons(self.layout, capture, wanted, self.model, cache, residual_cache=cache)
        writer.write(name, files, then=lambda: remove([mark]))
        self.report.n_prompts += 1

    # -- prompts that were captured before -------------------------------------------------------------

    def _revisit(self, plan: Plan) -> None:
        prompt_set = plan.prompt_set.name
        with self.reporter.progress(len(plan.saved), f"{prompt_set}, saved", "prompt") as progress:
            for prompt_id, wanted in plan.saved.items():
                name, before, failed = f"{prompt_set}/{prompt_id}", self.report.n_files, len(self.report.failures)
                raw = self.layout.residual(prompt_set, prompt_id)
                if self.options.projections_only and not raw.is_file():
                    self.report.n_skipped += 1
                    continue
                with self._attempt(name):
                    self._replay(Capture.open(raw), wanted)
                if len(self.report.failures) == failed:
                    if self.report.n_files > before:
                        self.report.n_prompts += 1
                    else:
                        self.report.n_skipped += 1
                progress.advance(1, done=f"{name}: {self.report.n_files - before} files")

    def _replay(self, capture: Capture, wanted: Outputs) -> None:
        if wanted.needs_pass or wanted.logit_lens:
            self._check_model(capture)
            if wanted.logit_lens and not capture.kept.has_all_outputs:
                raise InputError(
                    f"the logit lens needs residual_out of every layer, and {capture.kept.described()}: "
                    "capture it again with --logit-lens"
                )
            hooks = wanted.pass_hooks(self.model)
            cache = teacher_force(self.model, capture.token_ids, hooks) if hooks else {}
            for write in add_ons(self.layout, capture, wanted, self.model, cache, residual_cache=None):
                self.report.wrote(write())
        self._project(capture, only_missing=self.options.skip_existing)

    def _check_model(self, capture: Capture) -> None:
        mark = capture.metadata.get("model_fingerprint")
        if mark != self.model.fingerprint:
            raise InputError(
                f"it was captured from {capture.metadata.get('inference_model')!r} (fingerprint {mark}), not from "
                f"{self.model.name!r} ({self.model.fingerprint}): replay it with the same model"
            )

    # -- projection ---------------------------------------------------------------------------------------

    def _check_vectors(self, wanted: Outputs) -> None:
        """Raise `InputError` where no vector would fit, before prompts run of which nothing would be left."""
        will_be = ProjectedCapture.of_model(self.model, wanted.kept, attn_out=wanted.attn_out)
        if not any(self._chooser.vectors(will_be, component) for component in self.options.components):
            raise InputError("--projections-only: no trait has a vector that fits, so that nothing would be kept")

    def _project(self, capture: Capture, *, only_missing: bool = False, only: bool = False) -> None:
        if not self.options.project:
            return
        components = ["residual"] + (["attn_out"] if capture.prompt.residual.attn_out is not None else [])
        for component in components:
            choose = self._chooser.missing if only_missing else self._chooser.vectors
            project_capture(
                self.layout,
                capture,
                choose(capture, component),
                self.report,
                self.reporter,
                other_model_intended=self.options.vectors.experiment is not None,
                only=only,
            )
