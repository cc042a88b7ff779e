"""`tlcapture evaluate`: how well an experiment's vectors separate examples that took no part in finding them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch

from tlcapture.commands.evaluating.cross_traits import cross_traits
from tlcapture.commands.evaluating.entries import add_entry, entries_put_in, present_rows
from tlcapture.commands.evaluating.reference import has_reference, keep_reference
from tlcapture.commands.evaluating.rows import EvaluatedComponent, doubts, rows_of
from tlcapture.commands.extract import kept_activations
from tlcapture.commands.projecting.projections import warn_together
from tlcapture.errors import InputError, VectorError
from tlcapture.extraction.calibrating import calibrations
from tlcapture.extraction.examples import AUTO, GUESS, Examples, read_examples
from tlcapture.extraction.kept_activations import KeptActivations, source_digest
from tlcapture.extraction.prepared_examples import prepare_examples
from tlcapture.extraction.readout import read_out
from tlcapture.models.loading import Model
from tlcapture.names import Trait
from tlcapture.runs.display import Display
from tlcapture.runs.executors import Executor, LocalExecutor, Work
from tlcapture.runs.model_loader import ModelLoader
from tlcapture.runs.report import RunReport
from tlcapture.runs.run import Run
from tlcapture.runs.run_lock import run_lock
from tlcapture.storage.experiments.config import read_config
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import write_bytes, write_json
from tlcapture.traits.calibration import HELD_OUT, merged_calibrations
from tlcapture.traits.evaluation_files import Evaluation, EvaluationRow, read_evaluation
from tlcapture.traits.projections.projection import check_fits
from tlcapture.traits.vector_files import IMPORTED, METHODS, VectorFiles, check_available, traits_with_vectors
from tlcapture.traits.vectors import TraitVector, read_vector
from tlcapture.views.hooks import COMPONENTS

_CHANGED = "examples or model have changed since the vectors were extracted: extract them again"


@dataclass(frozen=True)
class EvaluateOptions:
    """Which vectors to evaluate; empty `traits` and `layers` mean all of them."""

    traits: tuple[Trait, ...] = ()
    methods: tuple[str, ...] = (*METHODS, IMPORTED)
    layers: tuple[int, ...] = ()
    components: tuple[str, ...] = COMPONENTS
    batch_size: int | None = None
    seed: int = 0
    examples_as: str = AUTO

    @property
    def named_methods(self) -> tuple[str, ...]:
        """The methods, if others than by default."""
        return () if self.methods == EvaluateOptions.methods else self.methods


def run_evaluate(
    layout: Layout,
    options: EvaluateOptions,
    load: ModelLoader,
    display: Display = Display(),
    executor: Executor = LocalExecutor(),
) -> RunReport:
    """Evaluate vectors and write `extraction_evaluation.json`; rows of other vectors are kept.

    Raises:
        InputError: the experiment has no vectors, or none of a trait, method or layer in `options`; nothing was
            written.
    """
    layout.check_exists()
    traits = traits_with_vectors(layout, options.traits)
    check_available(layout, traits, options.named_methods, options.layers)
    unscored = [] if options.traits else _without_examples(layout, traits)
    if unscored and len(unscored) == len(traits):
        folder = layout.root / "datasets" / "traits" / str(unscored[0])
        raise InputError(
            f"no examples to score the imported vectors of {', '.join(map(str, unscored))}: "
            f"expected positive.jsonl and negative.jsonl in {folder}"
        )
    run = Run.begin(layout, display)
    for trait in unscored:
        run.warn(f"left out: no examples to score the imported vectors of {trait}")
        traits.remove(trait)
    with entries_put_in(run):
        executor.run(Work(partial(_Worker, options), load, traits, lambda trait: 1, "trait"), run)
    _warn_of_doubts(run, traits, options)
    _write_cross_traits(run)
    return run.report


def _warn_of_doubts(run: Run, traits: Sequence[Trait], options: EvaluateOptions) -> None:
    """Warn of vectors that are no better than chance, once for all traits with the same doubt."""
    evaluated = Evaluation.read(run.layout.evaluation).rows_of
    failed = {each.what for each in run.report.failures}
    found: list[tuple[Trait, str]] = []
    for trait in (each for each in traits if str(each) not in failed):
        for component in options.components:
            rows = [row for row in evaluated.get(str(trait), ()) if row.component == component]
            if any(row.method in options.methods and row.layer in (options.layers or [row.layer]) for row in rows):
                found += [(trait, note) for note in doubts(rows)]
    warn_together(found, run)


def _without_examples(layout: Layout, traits: Sequence[Trait]) -> list[Trait]:
    """The traits that have no examples and only imported vectors, which were not made from any."""
    with_examples = Datasets(layout.root).traits()
    files = {trait: VectorFiles(layout, trait) for trait in traits if trait not in with_examples}
    methods = {trait: {*found.available("residual"), *found.available("attn_out")} for trait, found in files.items()}
    return [trait for trait, found in methods.items() if found == {IMPORTED}]


class _Worker:
    """Evaluates one trait after another.

    The model is loaded only if activations have to be read again, or if it has no reference of ordinary prompts yet.
    """

    def __init__(self, options: EvaluateOptions, run: Run, load: Callable[[], Model] | None):
        self._options = options
        self._run = run
        self._load = load

    def prepare(self) -> None:
        """Nothing: activations are usually those that `extract` kept."""

    def do(self, trait: Trait) -> None:
        """Evaluate a trait; an error is reported and does not stop the run."""
        with self._run.attempt(str(trait)), self._run.progress(1, str(trait), "trait") as progress:
            found = _evaluate(self._run, trait, self._options, lambda: self._model)
            if found:
                components = {name: {"rows": each.rows, "summary": each.summary} for name, each in found.items()}
                add_entry(self._run, {"trait": str(trait), "components": components})
            self._keep_reference(found)
            progress.advance(1, done=f"{trait}: {'evaluated' if found else 'no such vectors'}")

    def _keep_reference(self, found: Mapping[str, EvaluatedComponent]) -> None:
        """Make the references that the evaluated components lack; the model is loaded only where one is missing."""
        layout, is_loaded = self._run.layout, "_model" in vars(self)
        wanted = {component: each.model_fingerprint for component, each in found.items()}
        if not is_loaded and all(has_reference(layout, *each) for each in wanted.items()):
            return
        ours = [component for component, fingerprint in wanted.items() if fingerprint == self._model.fingerprint]
        if len(ours) < len(wanted):
            self._run.warn(f"no reference of ordinary prompts: the vectors are not of {self._model.name!r}")
        keep_reference(self._run, self._model, ours, self._options.batch_size)

    @cached_property
    def _model(self) -> Model:
        assert self._load is not None
        return self._load()


def draw_heatmaps(layout: Layout, report: RunReport) -> None:
    """Draw each evaluated trait's heatmaps to `evaluation.png` next to its vectors."""
    from tlcapture.commands.plots import evaluation_heatmaps

    by_trait: dict[str, list[EvaluationRow]] = {}
    for row in read_evaluation(layout.evaluation):
        by_trait.setdefault(row.trait, []).append(row)
    for trait, rows in by_trait.items():
        path = layout.picture(Trait.parse(trait), "evaluation")
        report.wrote(write_bytes(path, evaluation_heatmaps(trait, rows)))


def _evaluate(
    run: Run, trait: Trait, options: EvaluateOptions, model: Callable[[], Model]
) -> dict[str, EvaluatedComponent]:
    """The evaluation of a trait's vectors, by component.

    Those that were evaluated before are scored with them: the choice is among all that have scores, and so is chance.
    """
    layout, files = run.layout, VectorFiles(run.layout, trait)
    earlier = present_rows(layout, trait, Evaluation.read(layout.evaluation).rows_of.get(str(trait), ()))
    found: dict[str, EvaluatedComponent] = {}
    for component in options.components:
        available = files.available(component)
        wanted = {
            (method, layer)
            for method in options.methods
            for layer in available.get(method, ())
            if not options.layers or layer in options.layers
        }
        if not wanted:
            continue
        scored = wanted | {(row.method, row.layer) for row in earlier if row.component == component}
        methods = [each for each in available if any(method == each for method, _ in scored)]
        reading = _Reading.of(files, component, methods, options)
        _check_held_out(reading.examples)
        kept = _activations(run, files, component, reading, options, model)
        vectors = {
            method: [
                read_vector(files, component, method, layer) for layer in available[method] if (method, layer) in scored
            ]
            for method in methods
        }
        for vector in (vector for of_method in vectors.values() for vector in of_method):
            check_fits(vector, *kept.activations.shape[::2])
        made = rows_of(layout, reading.examples, kept, vectors, options.seed)
        _keep_calibrations(run, files, component, reading.examples, kept, vectors)
        found[component] = made
    return found


def _check_held_out(examples: Examples) -> None:
    if not all(examples.count(positive=side, held_out=True) for side in (True, False)):
        raise InputError(
            "no examples are held out on one or both sides: expected at least three pairs, or three unpaired examples "
            "a side; those that repeat one another count as one"
        )


class _MadeFrom(NamedTuple):
    """The digest of the examples that vectors were extracted from, and the fingerprint of the model."""

    examples: str | None
    fingerprint: str | None


@dataclass(frozen=True)
class _Reading:
    """How to read the examples: as the vectors' extraction read them, or as the options say.

    `made_from` is what extracted vectors record; `None` where all vectors were imported.
    """

    examples: Examples
    position: str
    made_from: _MadeFrom | None

    @classmethod
    def of(cls, files: VectorFiles, component: str, methods: Sequence[str], options: EvaluateOptions) -> _Reading:
        datasets, trait = Datasets(files.layout.root), files.trait
        if methods == [IMPORTED]:
            examples = read_examples(datasets, trait, seed=options.seed, examples_as=options.examples_as)
            return cls(examples, "auto", None)
        metadata = files.metadata(component)
        seed, position = _split_and_position(files, component)
        examples_as = metadata.get("examples_as") or options.examples_as
        examples = read_examples(datasets, trait, seed=seed, examples_as=examples_as)
        if metadata["split"].get("held_out_pairs") not in (None, examples.split_record(seed)["held_out_pairs"]):
            raise VectorError(_CHANGED)
        return cls(examples, position, _MadeFrom(metadata.get("examples"), metadata.get("model_fingerprint")))


def _split_and_position(files: VectorFiles, component: str) -> tuple[int, str]:
    """The seed of the split into examples for fitting and held-out ones, and the position at which they were read."""
    metadata, file = files.metadata(component), files.metadata_file(component)
    if not metadata:
        raise VectorError(
            f"{files.path}: {file.name}, which lists the held-out examples, is missing: extract the trait again"
        )
    seed, position = (metadata.get("split") or {}).get("seed"), metadata.get("position")
    if seed is None or position is None:
        raise VectorError(f"{file}: split or position of the examples is missing: extract the trait again")
    return int(seed), str(position)


def _activations(
    run: Run,
    files: VectorFiles,
    component: str,
    reading: _Reading,
    options: EvaluateOptions,
    model: Callable[[], Model],
) -> KeptActivations:
    """The activations that `extract` kept, if neither examples nor vectors have changed; otherwise they are read again.

    Raises `VectorError` if examples or model have changed since the vectors were extracted.
    """
    layout, path = run.layout, run.layout.example_activations(files.trait, component)
    kept = KeptActivations.read(path) if reading.made_from is not None else None
    source = source_digest(reading.examples, read_config(layout), reading.position)
    if kept is not None and kept.source == source and (kept.examples, kept.fingerprint) == reading.made_from:
        return kept
    prepared = prepare_examples(layout, model(), reading.examples, reading.position)
    if reading.made_from not in (None, _MadeFrom(prepared.digest, model().fingerprint)):
        raise VectorError(_CHANGED)
    if reading.examples.is_guess and reading.made_from is None:
        run.warn(GUESS)
    activations = read_out(model(), prepared.readings, [component], batch_size=options.batch_size)[component]
    kept = kept_activations(layout, model(), prepared, activations)
    if reading.made_from is not None:
        run.wrote(kept.write(path))
    return kept


def _keep_calibrations(
    run: Run,
    files: VectorFiles,
    component: str,
    examples: Examples,
    kept: KeptActivations,
    vectors: Mapping[str, Sequence[TraitVector]],
) -> None:
    """Add the vectors' calibrations on the held-out examples to their metadata."""
    labels = torch.tensor([item.positive for item in examples.items])
    held_out = torch.tensor([item.held_out for item in examples.items])
    with run_lock(run, f"vectors of {files.trait}"):
        for method, of_method in vectors.items():
            if not of_method:
                continue
            layers, stacked = [each.layer for each in of_method], torch.stack([each.vector for each in of_method])
            found = calibrations(stacked, kept.activations[layers][:, held_out], labels[held_out], layers)
            metadata = files.metadata(component, method)
            merged = merged_calibrations(metadata.get(HELD_OUT), {method: found})
            files.write_metadata(component, {**metadata, HELD_OUT: merged}, method)


def _write_cross_traits(run: Run) -> None:
    """Score every trait's selected vector on every trait's examples, where their activations were kept."""
    layout = run.layout
    if not layout.evaluation.is_file():
        return
    found = cross_traits(layout)
    with run_lock(run, "the evaluation"):
        content = Evaluation.read(layout.evaluation).model_dump(exclude_unset=True)
        cross = {"cross_trait": found.aurocs, "cross_trait_chance": found.chance}
        run.wrote(write_json(layout.evaluation, {**content, **cross}, indent=True))
