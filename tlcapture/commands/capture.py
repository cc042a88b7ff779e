"""`tlcapture capture`: prompt sets through the model, into files.

    model, prompts -> generate -> one prompt after another: raw residual, projections, add-ons

With `skip_existing` each prompt gets just what it lacks; with `replay`, or where a prompt's raw
residual is there already, add-ons come from the saved capture and one teacher-forced pass.

This module checks and plans, takes the locks, and hands the work out; `capture_worker` does it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from tlcapture.commands.capture_size import Estimate, n_projections
from tlcapture.commands.capture_tasks import CaptureOptions, Plan, Planner
from tlcapture.commands.capture_worker import CaptureWorker
from tlcapture.errors import InputError, NoSpaceError, StorageError
from tlcapture.logger import get_logger
from tlcapture.prompts.prompt_sets import PromptSet
from tlcapture.runs.display import Display
from tlcapture.runs.exclusive import alone
from tlcapture.runs.executors import Executor, LocalExecutor, Work
from tlcapture.runs.model_loader import ModelLoader
from tlcapture.runs.report import RunReport
from tlcapture.runs.run import Run
from tlcapture.storage.config import read_config
from tlcapture.storage.files import free_bytes, sweep_temporaries
from tlcapture.storage.layout import Layout
from tlcapture.text import as_ranges, format_bytes
from tlcapture.traits.missing_vectors import no_vectors
from tlcapture.traits.vector_files import VectorFiles, traits_with_vectors

__all__ = ["CaptureOptions", "estimate_capture", "run_capture"]

_log = get_logger(__name__)


def run_capture(
    layout: Layout,
    prompt_sets: Sequence[PromptSet],
    options: CaptureOptions,
    load: ModelLoader,
    display: Display = Display(),
    executor: Executor = LocalExecutor(),
) -> RunReport:
    """Capture prompt sets into an experiment. The model is loaded only when something needs it.

    Raises:
        InputError: the request is wrong; nothing was written.
        NoSpaceError: what would be written is more than is free, or the device is full by now.
    """
    _check(layout, options)
    run = Run.begin(layout, display)
    model = executor.model_access(load)
    planner = Planner(layout, options, read_config(layout), load.name, model.known)
    plans = planner.plans(prompt_sets)
    _check_space(Estimate.of(plans, layout, options, lambda: model.known().measures), layout)
    if layout.folder.exists():
        sweep_temporaries(layout.folder)
    for plan in plans:
        for what, reason in plan.refused:
            run.failed(what, reason)
        if plan.otherwise:
            run.warn(_otherwise(plan))
    busy = {plan.prompt_set.name for plan in plans if plan.does_something or (plan.saved and options.project)}
    run.report.n_skipped += sum(len(plan.saved) for plan in plans if plan.prompt_set.name not in busy)
    with ExitStack() as stack:
        # In one order, so that no two runs wait for each other.
        locks = [alone(run, f"captures of {name}", options.shard) for name in sorted(busy)]
        waited = [stack.enter_context(lock) for lock in locks]
        if any(waited):
            plans = planner.plans(prompt_sets)
        tasks = [plan for plan in plans if plan.prompt_set.name in busy]
        executor.run(
            Work(
                partial(CaptureWorker, options),
                model.load,
                tasks,
                size=lambda plan: len(plan.fresh) * options.max_new_tokens,
                unit="token",
                label=Plan.label,
                split=Plan.split,
                reads=[options.vectors.layout(layout)],
                inputs=lambda plan: [layout.residual(plan.prompt_set.name, prompt_id) for prompt_id in plan.saved],
            ),
            run,
        )
    return run.report


def _otherwise(plan: Plan) -> str:
    count = f"{len(plan.otherwise)} prompts were" if len(plan.otherwise) > 1 else f"prompt {plan.otherwise[0]} was"
    return (
        f"{plan.prompt_set.name}: {count} captured before with another temperature, seed or --max-new-tokens, and kept "
        "so: without --skip-existing it is captured anew"
    )


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
    for folder in (layout.folder.parent, layout.folder):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: expected a folder, a file is there")
    if layout.folder.exists() and not os.access(layout.folder, os.W_OK):
        raise StorageError(f"{layout.folder}: cannot be written to")
    if options.project:
        _check_vectors(layout, options)


def _check_vectors(layout: Layout, options: CaptureOptions) -> None:
    """Raise `InputError` for vectors that are asked for and that no trait has, before any prompt runs."""
    choice, source = options.vectors, options.vectors.layout(layout)
    if choice.experiment or choice.traits:
        traits_with_vectors(source, choice.traits)
    there = [VectorFiles(source, trait).available("residual") for trait in choice.traits or source.traits()]
    if choice.method is not None:
        methods = sorted({method for available in there for method in available})
        if methods and choice.method not in methods:
            raise InputError(f"--method {choice.method}: no trait has such vectors; there are {', '.join(methods)}")
    if not isinstance(choice.layer, str):
        layers = sorted({layer for available in there for at in available.values() for layer in at})
        if layers and choice.layer not in layers:
            raise InputError(
                f"--layer {choice.layer}: no trait has a vector there; layers with vectors: {as_ranges(layers)}"
            )


def _check_projections_only(layout: Layout, options: CaptureOptions) -> None:
    if options.replay or not options.project:
        raise InputError("--projections-only keeps nothing but projections: leave out --replay and --no-project")
    if options.internals:
        raise InputError("--projections-only keeps no raw activations: leave out --layer-internals")
    if not n_projections(layout, options):
        raise InputError(f"--projections-only: {no_vectors(options.vectors.layout(layout))}")


def _check_space(estimate: Estimate, layout: Layout) -> None:
    """Raise `NoSpaceError` where more would be written than is free, what is replaced counted as free."""
    free = free_bytes(layout.folder)
    _log.info("about %s will be written, %s are free", format_bytes(estimate.n_bytes), format_bytes(free))
    if estimate.n_bytes > free and estimate.n_bytes - estimate.replaced() > free:
        raise NoSpaceError(
            f"{layout.folder}: about {format_bytes(estimate.n_bytes)} would be written, "
            f"{format_bytes(free)} are free on its device (--dry-run shows the sum)"
        )
