"""`tlcapture project`: project saved captures onto trait vectors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tlcapture.captures.capture import Capture
from tlcapture.commands.capturing.places import chunks
from tlcapture.commands.projecting.projections import (
    TOKENS_MISSING,
    ChanceLevels,
    ExistingProjections,
    massive_line,
    project_capture,
    scores_among,
    vector_chooser,
    without_projection,
)
from tlcapture.commands.projecting.saved_prompts import saved_prompts
from tlcapture.commands.prompt_files.known_files import KnownFiles, PromptFiles
from tlcapture.commands.prompt_files.projection_writing import merge_projections
from tlcapture.errors import NumericalError
from tlcapture.names import PromptId, Trait
from tlcapture.runs.display import Display
from tlcapture.runs.executors import Executor, LocalExecutor, Work
from tlcapture.runs.prompt_shares import PromptShare
from tlcapture.runs.report import RunReport
from tlcapture.runs.run import Run
from tlcapture.runs.run_lock import run_lock
from tlcapture.storage.experiments.command_lines import command_line
from tlcapture.storage.experiments.config import read_config
from tlcapture.storage.experiments.file_index import remember
from tlcapture.storage.experiments.layout import Layout
from tlcapture.text import counted, listed
from tlcapture.traits.centring import Centred
from tlcapture.traits.choice import ChosenVector, VectorChoice
from tlcapture.traits.mean_activations import check_means
from tlcapture.traits.missing_vectors import no_component_vectors
from tlcapture.traits.projections.files import ProjectionFile
from tlcapture.traits.projections.projection import dynamics_of_file, movement_of_file
from tlcapture.traits.projections.saved import SavedProjection, projections_of_prompt, write_sharded
from tlcapture.traits.statistics.rises import DEFINITIONS
from tlcapture.traits.statistics.span_dynamics import by_span
from tlcapture.traits.vector_files import VectorFiles, traits_with_vectors
from tlcapture.traits.vector_sources.packaged import PROJECTED_ONTO_PACKAGED


@dataclass(frozen=True)
class ProjectOptions:
    """Which vectors to project onto, and which component; `dynamics_only` recomputes the dynamics alone.

    `centered` subtracts the mean activation of each vector's training examples first. `overwrite` replaces files that
    cannot be read, too. `shard` is a share of the captures that exist when the run begins. `form` is the form of the
    files, as in `ViewParts`.
    """

    vectors: VectorChoice = VectorChoice()
    component: str = "residual"
    dynamics_only: bool = False
    centered: bool = False
    skip_existing: bool = False
    overwrite: bool = False
    shard: PromptShare | None = None
    form: str | None = None


def run_project(
    layout: Layout,
    prompt_sets: Sequence[str],
    options: ProjectOptions,
    display: Display = Display(),
    executor: Executor = LocalExecutor(),
) -> RunReport:
    """Project all captures of prompt sets.

    Raises:
        InputError: the experiment, a prompt set, its captures or the vectors are missing; nothing was written.
    """
    layout.check_exists()
    ids = {name: saved_prompts(layout, name, dynamics_only=options.dynamics_only) for name in prompt_sets}
    if options.shard is not None:
        ids = {name: list(options.shard.of(names)) for name, names in ids.items()}
    run = Run.begin(layout, display)
    if options.dynamics_only:
        for name in prompt_sets:
            with run_lock(run, f"captures of {name}", options.shard, "projection"):
                _recompute_dynamics(run, name, ids[name], options)
                merge_projections(run, [name], options.shard)
        remember(layout, run.report.learned)
        return run.report
    options = replace(options, vectors=options.vectors.or_packaged(layout, read_config(layout).inference_model))
    source = options.vectors.layout(layout)
    _check_vectors(source, options)
    if options.vectors.is_fallback:
        run.line(f"{layout.experiment}: {PROJECTED_ONTO_PACKAGED}")
    with ExitStack() as stack:
        stack.callback(remember, layout, run.report.learned)
        for name in sorted(prompt_sets):
            stack.enter_context(run_lock(run, f"captures of {name}", options.shard, "projection"))
        executor.run(
            Work(
                partial(ProjectionWorker, options),
                None,
                [SavedPrompts(name, ids[name]) for name in prompt_sets],
                size=lambda task: len(task.ids),
                unit="prompt",
                split=SavedPrompts.split,
                reads=[source],
                inputs=lambda task: [layout.residual(task.prompt_set, each) for each in task.ids],
                overwrite=options.overwrite,
            ),
            run,
        )
        merge_projections(run, prompt_sets, options.shard)
    return run.report


def _check_vectors(source: Layout, options: ProjectOptions) -> None:
    """Raise `InputError` if no trait has the vectors that are asked for, or one lacks the mean to subtract."""
    traits = traits_with_vectors(source, options.vectors.traits)
    if not any(VectorFiles(source, trait).available(options.component) for trait in traits):
        raise no_component_vectors(source, options.component)
    options.vectors.check(source, options.component)
    if options.centered:
        check_means(source, traits, options.component)


@dataclass(frozen=True)
class SavedPrompts:
    """Prompts of a set that have captures."""

    prompt_set: str
    ids: Sequence[str]

    def split(self, most: int) -> list[SavedPrompts]:
        """Parts of at most `most` prompts."""
        return [SavedPrompts(self.prompt_set, ids) for ids in chunks(self.ids, most)]

    def __str__(self) -> str:
        return f"{len(self.ids)} prompts of {self.prompt_set}"


class ProjectionWorker:
    """Projects saved captures onto the chosen vectors."""

    def __init__(self, options: ProjectOptions, run: Run, load: object):
        self._options = options
        self._run = run
        self._layout = run.layout
        self._chooser = vector_chooser(run, options.vectors)
        self._levels = ChanceLevels(run)
        self._centred: list[tuple[Trait, Centred]] = []
        self._without_component: list[PromptId] = []  # captures of the task, which fail together

    def prepare(self) -> None:
        """Load nothing: vectors are chosen when the first capture has been read."""

    def do(self, task: SavedPrompts) -> None:
        """Project a task's captures; a failure of one does not stop the others."""
        with self._run.progress(len(task.ids), task.prompt_set, "prompt") as progress:
            files = KnownFiles(self._layout, task.prompt_set, len(task.ids), self._run.report.learn)
            for prompt_id in task.ids:
                with self._run.attempt(f"{task.prompt_set}/{prompt_id}"):
                    self._project(files.of(prompt_id))
                progress.advance(1)
        if any(each.variance_share is not None for _, each in self._centred):
            self._run.line(f"{task.prompt_set}: {massive_line(self._centred)}")
        if self._without_component:
            which, n_all = listed(map(str, self._without_component)), counted(len(task.ids), "capture")
            reason = f"{len(self._without_component)} of {n_all} hold no attn_out ({which}): capture again with"
            self._run.failed(task.prompt_set, f"{reason} --capture-attn")
        self._centred, self._without_component = [], []

    def _project(self, files: PromptFiles) -> None:
        options = self._options
        existing = ExistingProjections(overwrite=options.overwrite, centred=options.centered)
        vectors: Sequence[ChosenVector] | None = None
        chosen: Sequence[ChosenVector] = ()
        if options.skip_existing and (known := files.capture(advice="")) is not None:
            chosen = self._chooser.vectors(known, options.component)
            vectors = without_projection(files, chosen, existing)
            if not vectors:
                self._run.report.n_skipped += 1
                return
        capture = Capture.open(files.raw)
        vectors = self._chooser.vectors(capture, options.component) if vectors is None else vectors
        if not vectors:
            return
        if options.component not in capture.prompt.residual.components:
            self._without_component.append(files.name)
            return
        try:
            projections = project_capture(
                self._run,
                capture,
                vectors,
                self._levels,
                centred=options.centered,
                overwrite=options.overwrite,
                scores=scores_among(capture, chosen, vectors) if len(vectors) < len(chosen) else None,
                form=options.form,
            )
        except NumericalError as error:
            raise NumericalError(f"{files.raw}: {error}") from None
        self._run.report.n_prompts += 1
        self._centred += [(each.vector.trait, each.centred) for each in projections if each.centred is not None]


def _recompute_dynamics(run: Run, prompt_set: str, ids: Sequence[str], options: ProjectOptions) -> None:
    """Rewrite projection files with new dynamics and otherwise unchanged content."""
    layout, bare = run.layout, 0
    with run.progress(len(ids), prompt_set, "prompt") as progress:
        for prompt_id in ids:
            name = f"{prompt_set}/{prompt_id}"
            projections: list[SavedProjection] | None = None
            with run.attempt(name):
                projections = projections_of_prompt(
                    layout, prompt_set, prompt_id, options.component, options.vectors.traits
                )
            if not projections:
                bare += projections is not None
                continue
            in_shards: dict[str, dict[str, Any]] = {}
            for saved in projections:
                with run.attempt(name):
                    content = _with_new_dynamics(saved)
                    if "positions" in content["metadata"]:
                        run.warn(TOKENS_MISSING)
                    if saved.sharded is None:
                        run.wrote(saved.write(content))
                    else:
                        in_shards[saved.sharded.trait] = content
            if in_shards:
                with run.attempt(name):
                    run.wrote(write_sharded(next(each for each in projections if each.sharded), in_shards))
            run.report.n_prompts += 1
            progress.advance(1)
    if bare:
        words = [] if options.component == "residual" else ["--component", options.component]
        words += ["--traits", ",".join(map(str, options.vectors.traits))] if options.vectors.traits else []
        command = command_line(layout, "project", "--prompt-set", prompt_set, *words, "--skip-existing")
        which = f"{bare} of {len(ids)} prompts {'has' if bare == 1 else 'have'} no projection"
        run.failed(prompt_set, f"{which} to recompute the dynamics of: run '{command}' first")


def _with_new_dynamics(saved: SavedProjection) -> dict[str, Any]:
    """The content of a projection file with recomputed dynamics; the earlier ones may be invalid.

    Results of random directions are kept only if they were measured by the same definitions.
    """
    content = saved.content(exact=True)
    others = (
        {key: value for key, value in content.items() if key != "dynamics"} if isinstance(content, dict) else content
    )
    checked = ProjectionFile.parse(others, saved.path)
    metadata = {**content["metadata"], "definitions": DEFINITIONS}
    if checked.metadata.definitions != DEFINITIONS:
        metadata.pop("chance", None)
    dynamics = dynamics_of_file(checked).to_json()
    if checked.spans:
        dynamics["by_span"] = by_span(movement_of_file(checked).numpy()[None], checked.spans)[0]
    return {**content, "dynamics": dynamics, "metadata": metadata}
