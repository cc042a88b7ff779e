"""`tlcapture capture`: run prompt sets through the model and write captures.

    model, prompts -> generate -> one prompt after another: raw residual, projections, add-ons

With `skip_existing` only missing files are made. With `replay`, and for prompts whose raw residual exists, add-ons are
computed from the saved capture and one teacher-forced pass.

This module checks the request, plans the tasks, takes the locks and starts the work, which `capture_worker` does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from tlcapture.commands.capturing.affected_files import AffectedFiles
from tlcapture.commands.capturing.interventions import with_vectors
from tlcapture.commands.capturing.memory_need import PromptLength, Sized, check_memory, most_memory, prompt_lengths
from tlcapture.commands.capturing.options import NO_CHOICE, CaptureOptions
from tlcapture.commands.capturing.projections import NOTHING_KEPT
from tlcapture.commands.capturing.size import CaptureSize, projected_onto
from tlcapture.commands.capturing.tasks import CaptureTask, TaskPlanner
from tlcapture.commands.capturing.worker import CaptureWorker
from tlcapture.commands.prompt_files.projection_writing import merge_projections
from tlcapture.commands.prompt_files.records import CaptureRecord
from tlcapture.errors import InputError, NoSpaceError, StorageError
from tlcapture.models.loading import Model, ModelOutline
from tlcapture.models.sizes import Measures
from tlcapture.names import file_name
from tlcapture.prompts.prompt_sets import PromptSet, mistyped_keys
from tlcapture.prompts.tokenization import check_unicode
from tlcapture.runs.display import Display
from tlcapture.runs.executors import Executor, LocalExecutor, Work
from tlcapture.runs.model_loader import ModelLoader
from tlcapture.runs.processes import starting_early
from tlcapture.runs.report import Failed, RunReport
from tlcapture.runs.run import Run
from tlcapture.runs.run_lock import run_lock
from tlcapture.storage.experiments.file_index import remember
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.experiments.prompts_with_files import PromptsWithFiles
from tlcapture.storage.files import free_bytes, remove, write_bytes
from tlcapture.storage.folders import stems_in
from tlcapture.storage.regular_files import is_folder
from tlcapture.storage.temporary_files import sweep_temporaries
from tlcapture.text import format_bytes
from tlcapture.traits.choice import ChosenVectors, choose_vectors
from tlcapture.traits.missing_vectors import no_vectors
from tlcapture.traits.vector_files import traits_with_vectors
from tlcapture.traits.vector_sources.packaged import NOTHING_TO_PROJECT_ONTO, PROJECTED_ONTO_PACKAGED

__all__ = ["CaptureOptions", "estimate_capture", "run_capture"]

_log = logging.getLogger(__name__)


def run_capture(
    layout: Layout,
    prompt_sets: Sequence[PromptSet],
    options: CaptureOptions,
    load: ModelLoader,
    display: Display = Display(),
    executor: Executor = LocalExecutor(),
    refused: Sequence[tuple[str, str]] = (),
    renumber: Callable[[Layout, PromptSet], PromptSet] | None = None,
) -> RunReport:
    """Capture prompt sets into an experiment. The model is loaded only if something has to be computed.

    `refused` are names of prompt sets that could not be read, with the reasons; they are added to the failures.
    `renumber` gives prompts ids that are free, once no other run writes captures of their set.

    Returns:
        What was written and which prompts failed.

    Raises:
        InputError: the request is wrong; nothing was written.
        NoSpaceError: the files would need more space than is free, or the device became full during the run.
    """
    options = with_vectors(options, layout, load)
    _check(layout, options)
    if options.projections_only and not (options.skip_existing or options.vectors.is_fallback):
        _chosen_vectors(layout, options, load.name, load.outline.measures)
    run = Run.begin(layout, display)
    for what, reason in refused:
        run.failed(what, reason)
    _warn_of_request(run, prompt_sets, options)
    with starting_early(_n_projected(prompt_sets, options) if isinstance(executor, LocalExecutor) else 0):
        return _captured(run, layout, prompt_sets, options, load, executor, renumber)


def _captured(
    run: Run,
    layout: Layout,
    prompt_sets: Sequence[PromptSet],
    options: CaptureOptions,
    load: ModelLoader,
    executor: Executor,
    renumber: Callable[[Layout, PromptSet], PromptSet] | None,
) -> RunReport:
    """Plan the tasks of a run, take its locks and carry it out."""
    known_model = partial(executor.known_model, load)
    planner = TaskPlanner(layout, options, load, known_model, run.report.learn)
    tasks = planner.tasks(prompt_sets)
    _check_space(tasks, layout, options, lambda: known_model().measures)
    known = known_model() if any(task.has_work for task in tasks) else None
    if isinstance(known, Model):
        check_memory(tasks, layout, options, known)
    for folder in [layout.folder, *layout.written_folders(task.capture_set for task in tasks)]:
        sweep_temporaries(folder)
    _tell_of_plan(run, tasks, options)
    busy = {task.capture_set for task in tasks if task.has_work or (task.saved and options.projects)}
    run.report.n_skipped += sum(len(task.saved) for task in tasks if task.capture_set not in busy)
    with ExitStack() as stack:
        stack.callback(remember, layout, run.report.learned)
        # Always in the same order, so that no two runs wait for each other.
        locks = [run_lock(run, f"captures of {name}", options.shard) for name in sorted(busy)]
        waited = [stack.enter_context(lock) for lock in locks]
        if renumber is not None:
            prompt_sets = [renumber(layout, each) for each in prompt_sets]
        if any(waited) or renumber is not None:
            tasks = planner.tasks(prompt_sets)
        for failed in (each for task in tasks for each in task.failing):
            run.failed(*failed)
        # Where other processes load the model, each of them compares these with the memory of its machine.
        lengths = prompt_lengths(tasks, layout, options, known.n_layers) if isinstance(known, ModelOutline) else ()
        planned = {task.capture_set: {"new": len(task.fresh), "kept": len(task.saved)} for task in tasks}
        run.display.uses(planned=planned)
        with _marked(run, tasks, options):
            executor.run(_work(layout, options, load, tasks, busy, lengths), run)
        if options.projects:
            merge_projections(run, sorted(busy), options.shard)
    return run.report


@contextmanager
def _marked(run: Run, tasks: Sequence[CaptureTask], options: CaptureOptions) -> Iterator[None]:
    """Mark prompts whose files will be replaced as unfinished, so that `--skip-existing` goes on where a run stopped.

    Those that failed keep their files and their mark.
    """
    layout, markers = run.layout, dict[str, Path]()
    for task in tasks if not options.skip_existing else ():
        before = PromptsWithFiles(layout, task.capture_set)
        captured = {name.casefold() for name in stems_in(layout.residual(task.capture_set, "x").parent, ".pt")}
        for name in task.fresh:
            if file_name(name).casefold() in captured or before.may_have_any(name):
                markers[f"{task.capture_set}/{name}"] = layout.unfinished(task.capture_set, name)
    for marker in markers.values():
        write_bytes(marker, b"")
    yield
    failed = {each.what for each in run.report.failures}
    remove(marker for name, marker in markers.items() if name not in failed)


def _n_projected(prompt_sets: Sequence[PromptSet], options: CaptureOptions) -> int:
    """The captures whose projections other processes will write; 0 where that depends on what is there already."""
    here = not options.projects or options.projections_only or options.tokens is not None  # as in `CaptureWorker`
    if here or options.skip_existing:
        return 0
    return sum(len(each.prompts) for each in prompt_sets) * (options.samples or 1)


def _warn_of_request(run: Run, prompt_sets: Sequence[PromptSet], options: CaptureOptions) -> None:
    for doubt in (doubt for each in options.resolved for doubt in each.doubts):
        run.warn(doubt)
    for note in (note for prompt_set in prompt_sets for note in mistyped_keys(prompt_set)):
        run.warn(note)


def _tell_of_plan(run: Run, tasks: Sequence[CaptureTask], options: CaptureOptions) -> None:
    for note in (note for task in tasks for note in task.notes):
        run.warn(note)
    if options.projects and options.vectors.is_fallback:
        run.line(f"{run.layout.experiment}: {PROJECTED_ONTO_PACKAGED}")
    elif options.projects and not options.vectors.layout(run.layout).traits():
        run.line(f"{run.layout.experiment}: {NOTHING_TO_PROJECT_ONTO}")


def _work(
    layout: Layout,
    options: CaptureOptions,
    load: ModelLoader,
    tasks: Sequence[CaptureTask],
    busy: Collection[str],
    lengths: Sequence[PromptLength],
) -> Work:
    """The work on the tasks of the sets in `busy`."""
    norm_prompts = {task.prompt_set.name: task.norm_prompts for task in tasks}
    return Work(
        partial(CaptureWorker, options, norm_prompts=norm_prompts, lengths=lengths),
        load,
        [task for task in tasks if task.capture_set in busy],
        size=lambda task: len(task.fresh) * task.max_new_tokens,
        unit="token",
        split=CaptureTask.split,
        reads=[options.vectors.layout(layout)],
        inputs=lambda task: [layout.residual(task.capture_set, prompt_id) for prompt_id in task.saved],
        overwrite=options.overwrite,
    )


def estimate_capture(
    layout: Layout,
    prompt_sets: Sequence[PromptSet],
    options: CaptureOptions,
    load: ModelLoader,
    *,
    elsewhere: bool = False,
) -> tuple[CaptureSize, AffectedFiles]:
    """The size of what `run_capture` would write, and which existing files it would change; writes nothing.

    The model's weights are not loaded. With `elsewhere`, the memory of this machine does not matter.
    """
    outline = load.outline
    options = with_vectors(options, layout, load)
    _check(layout, options)
    tasks = TaskPlanner(layout, options, load, lambda: outline).tasks(prompt_sets)
    affected = AffectedFiles.of(tasks, layout, options, outline.n_layers)
    is_known = options.projects and not options.vectors.is_fallback and any(task.fresh for task in tasks)
    chosen = _chosen_vectors(layout, options, load.name, outline.measures) if is_known else []
    affected.failures += [Failed(str(trait), str(error)) for each in chosen for trait, error in each.failures]
    n_vectors = sum(len(each.vectors) for each in chosen) if is_known else None
    size = CaptureSize.of(tasks, layout, options, lambda: outline.measures, n_vectors)
    size.add_projections(affected.projected, options, outline.measures)
    model = Sized.of(outline.measures, load.device, load.dtype)
    size.memory = most_memory(tasks, layout, options, model)
    try:
        if not elsewhere:
            check_memory(tasks, layout, options, model)
    except InputError as error:
        size.failures.append(Failed("memory", str(error)))
    return size, affected


def _chosen_vectors(layout: Layout, options: CaptureOptions, model: str, measures: Measures) -> list[ChosenVectors]:
    """The vectors of each component that new captures will be projected onto, and why others do not fit.

    Raises `InputError` if nothing would be kept of new captures.
    """
    record = CaptureRecord.of_measures(model, measures, options.outputs(measures.n_layers).kept)
    source = options.vectors.layout(layout)
    found = [choose_vectors(source, options.vectors, record, component) for component in options.components]
    if options.projections_only and not any(each.vectors for each in found):
        reasons = [str(error) for each in found for _, error in each.failures]
        raise InputError(": ".join([NOTHING_KEPT, *reasons[:1]]))
    return found


def _check(layout: Layout, options: CaptureOptions) -> None:
    options.check_parts()
    if options.system_prompt is not None:
        check_unicode(options.system_prompt, "--system-prompt")
    if options.projections_only:
        _check_projections_only(layout, options)
    if options.replay:
        _check_replay(options)
    if is_folder(layout.folder) and not os.access(layout.folder, os.W_OK):
        raise StorageError(f"{layout.folder}: cannot be written to")
    if options.projects:
        _check_vectors(layout, options)


def _check_replay(options: CaptureOptions) -> None:
    for is_asked, what in (
        (options.capture_attn, "capture attention outputs"),
        (options.layers or options.points, "use --layers and --points"),
        (options.overwrite, "use --overwrite"),
    ):
        if is_asked:
            raise InputError(f"--replay does not change raw residuals: leave it out to {what}")
    if options.project and options.vectors != NO_CHOICE:
        raise InputError(
            "--replay leaves projections as they are: leave out --layer, --method and --vector-experiment, which "
            "'tlcapture project' takes"
        )
    if not (options.attention or options.logit_lens or options.internals):
        raise InputError(
            "--replay computes only what is asked for: add --attention, --logit-lens or --layer-internals ('tlcapture "
            "project' makes projections)"
        )


def _check_vectors(layout: Layout, options: CaptureOptions) -> None:
    """Raise `InputError` before any prompt runs if no trait has the vectors that are asked for."""
    choice, source = options.vectors, options.vectors.layout(layout)
    if choice.experiment or choice.traits:
        traits_with_vectors(source, choice.traits)
    choice.check(source, "residual")


def _check_projections_only(layout: Layout, options: CaptureOptions) -> None:
    if not options.projects:
        raise InputError("--projections-only keeps only projections: leave out --replay and --no-project")
    if options.internals:
        raise InputError("--projections-only keeps no raw activations: leave out --layer-internals")
    if not projected_onto(layout, options):
        raise InputError(f"--projections-only: {no_vectors(options.vectors.layout(layout))}")


def _check_space(
    tasks: Sequence[CaptureTask], layout: Layout, options: CaptureOptions, measures: Callable[[], Measures]
) -> None:
    """Raise `NoSpaceError` if the files need more space than is free, counting that of replaced files as free."""
    size, free = CaptureSize.of(tasks, layout, options, measures), free_bytes(layout.folder)
    longest = max((task.max_new_tokens for task in tasks if task.fresh), default=0)
    _log.info("about %s will be written, %s free", format_bytes(size.n_bytes), format_bytes(free))
    if size.n_bytes > free and size.n_bytes - size.replaced() > free:
        raise NoSpaceError(
            f"{layout.folder}: about {format_bytes(size.n_bytes)} would be written"
            f"{f' if responses have {longest} tokens (--max-new-tokens)' if longest else ''}, "
            f"{format_bytes(free)} are free on its device (--dry-run shows the sum)"
        )
