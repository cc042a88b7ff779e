"""`tlcapture evaluate`: how well an experiment's vectors separate the held-out examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tlcapture.commands.held_out_calibrations import keep_held_out_calibrations
from tlcapture.commands.reference import keep_reference
from tlcapture.errors import VectorError
from tlcapture.extraction.calibrating import calibrations
from tlcapture.extraction.evaluation import RandomBaseline, Separation, random_baseline, separation
from tlcapture.extraction.prepared_examples import PreparedExamples, prepare_examples
from tlcapture.extraction.readout import Activations, read_out
from tlcapture.models.loading import Model
from tlcapture.names import Trait
from tlcapture.runs.display import Display
from tlcapture.runs.executors import Executor, LocalExecutor, Work
from tlcapture.runs.model_loader import ModelLoader
from tlcapture.runs.model_worker import ModelWorker
from tlcapture.runs.report import RunReport
from tlcapture.runs.run import Run
from tlcapture.runs.run_lock import run_lock
from tlcapture.storage.files import write_bytes, write_json
from tlcapture.storage.layout import Datasets, Layout
from tlcapture.storage.rounding import PROJECTION_DIGITS, round_significant
from tlcapture.text import as_ranges
from tlcapture.traits.evaluation_files import EvaluationRow, best_by_trait, read_evaluation
from tlcapture.traits.vector_files import METHODS, VectorFiles, traits_with_vectors
from tlcapture.traits.vectors import TraitVector, read_vector
from tlcapture.views.hooks import COMPONENTS

Row = dict[str, Any]


@dataclass(frozen=True)
class EvaluateOptions:
    """Which vectors to evaluate; empty `traits` and `layers` mean all of them."""

    traits: tuple[Trait, ...] = ()
    methods: tuple[str, ...] = METHODS
    layers: tuple[int, ...] = ()
    components: tuple[str, ...] = COMPONENTS
    batch_size: int | None = None
    seed: int = 0


def run_evaluate(
    layout: Layout,
    options: EvaluateOptions,
    load: ModelLoader,
    display: Display = Display(),
    executor: Executor = LocalExecutor(),
) -> RunReport:
    """Evaluate vectors and write `extraction_evaluation.json`; rows of other vectors are kept.

    Raises:
        InputError: the experiment has no vectors, or none of a trait in `options`; nothing was written.
    """
    layout.check_exists()
    traits = traits_with_vectors(layout, options.traits)
    run = Run.begin(layout, display)
    make = partial(ModelWorker, _evaluate_one, options)
    executor.run(Work(make, load, traits, lambda trait: 1, "trait", str), run)
    return run.report


def _evaluate_one(run: Run, model: Model, options: EvaluateOptions, trait: Trait) -> None:
    keep_reference(run, model, options.components, options.batch_size)
    with run.progress(1, str(trait), "trait") as progress:
        rows = _evaluate(run, trait, model, options)
        if rows:
            with run_lock(run, "the evaluation"):
                run.wrote(write_json(run.layout.evaluation, _merged(run.layout, rows), indent=True))
        progress.advance(1, done=f"{trait}: evaluated")


def best_rows(layout: Layout) -> list[EvaluationRow]:
    """The best row of each trait in the evaluation file, by trait."""
    return [row for _, row in sorted(best_by_trait(read_evaluation(layout.evaluation)).items())]


def draw_heatmaps(layout: Layout, report: RunReport) -> None:
    """Draw each evaluated trait's heatmaps to `evaluation.png` next to its vectors."""
    from tlcapture.commands.plots import evaluation_heatmaps

    by_trait: dict[str, list[EvaluationRow]] = {}
    for row in read_evaluation(layout.evaluation):
        by_trait.setdefault(row.trait, []).append(row)
    for trait, rows in by_trait.items():
        path = layout.picture(Trait.parse(trait), "evaluation")
        report.wrote(write_bytes(path, evaluation_heatmaps(trait, rows)))


def _evaluate(run: Run, trait: Trait, model: Model, options: EvaluateOptions) -> list[Row]:
    layout = run.layout
    folder = VectorFiles(layout, trait)
    rows: list[Row] = []
    prepared: PreparedExamples | None = None
    for component in options.components:
        available = folder.available(component)
        methods = [method for method in options.methods if method in available]
        if not methods:
            continue
        metadata = folder.metadata(component)
        if not metadata:
            raise VectorError(
                f"{folder.path}: metadata.json, which lists the held-out examples, is missing: extract the trait again"
            )
        seed, position = (metadata.get("split") or {}).get("seed"), metadata.get("position")
        if seed is None or position is None:
            file = folder.metadata_file(component)
            raise VectorError(f"{file}: split or position of the examples is missing: extract the trait again")
        prepared = prepared or prepare_examples(
            Datasets(layout.root), layout, trait, model, seed=seed, position=position
        )
        if prepared.digest != metadata.get("examples") or model.fingerprint != metadata.get("model_fingerprint"):
            raise VectorError("examples or model have changed since the vectors were extracted: extract them again")
        activations = read_out(model, prepared.readings, [component], batch_size=options.batch_size)[component]
        baseline = random_baseline(activations, prepared.labels, prepared.held_out, seed=options.seed)
        held_out = {}
        for method in methods:
            layers = [layer for layer in available[method] if not options.layers or layer in options.layers]
            vectors = [read_vector(folder, component, method, layer) for layer in layers]
            rows += _rows(layout, vectors, activations, prepared, baseline, options.seed)
            held_out[method] = _held_out_calibrations(vectors, activations, prepared)
        keep_held_out_calibrations(run, folder, component, held_out)
    for note in _doubts(rows):
        run.warn(f"{trait}: {note}")
    return rows


def _held_out_calibrations(
    vectors: Sequence[TraitVector], activations: Activations, prepared: PreparedExamples
) -> dict[str, Any]:
    layers, held_out = [vector.layer for vector in vectors], prepared.held_out
    if not vectors:
        return {}
    stacked = torch.stack([vector.vector for vector in vectors])
    return calibrations(stacked, activations[layers][:, held_out], prepared.labels[held_out], layers)


def _rows(
    layout: Layout,
    vectors: Sequence[TraitVector],
    activations: Activations,
    prepared: PreparedExamples,
    baseline: RandomBaseline,
    seed: int,
) -> list[Row]:
    if not vectors:
        return []
    layers = [vector.layer for vector in vectors]
    stacked = torch.stack([vector.vector for vector in vectors])
    found = separation(stacked, activations[layers], prepared.labels, prepared.held_out, seed=seed)
    return [_row(layout, vector, number, found, baseline, prepared) for number, vector in enumerate(vectors)]


def _row(
    layout: Layout,
    vector: TraitVector,
    number: int,
    found: Separation,
    baseline: RandomBaseline,
    prepared: PreparedExamples,
) -> Row:
    effect = _number(found.effect_size[number])
    return {
        "trait": str(vector.trait),
        "method": vector.method,
        "layer": vector.layer,
        "component": vector.component,
        "vector_digest": VectorFiles(layout, vector.trait).digest(vector.component, vector.method, vector.layer),
        "val_accuracy": _number(found.accuracy[number]),
        "val_auroc": _number(found.auroc[number]),
        "val_effect_size": effect,
        "val_effect_size_interval": [_number(bound) for bound in found.interval[number]],
        "polarity": "positive" if effect > 0 else "negative",
        "n_val": int(prepared.held_out.sum()),
        "random_auroc": _number(baseline.mean[vector.layer]),
        "random_auroc_p95": _number(baseline.p95[vector.layer]),
        "cosine_to_methods": _cosines(vector, [(m, vector.trait, m) for m in METHODS if m != vector.method], layout),
        "cosine_to_traits": _cosines(
            vector, [(str(t), t, vector.method) for t in layout.traits() if t != vector.trait], layout
        ),
    }


def _cosines(vector: TraitVector, others: Sequence[tuple[str, Trait, str]], layout: Layout) -> dict[str, float]:
    """Cosines to the existing vectors of other methods or traits at the same layer."""
    cosines = {}
    for name, trait, method in others:
        folder = VectorFiles(layout, trait)
        if folder.file(vector.component, method, vector.layer).is_file():
            other = read_vector(folder, vector.component, method, vector.layer).vector
            if other.shape == vector.vector.shape:
                cosines[name] = _number(torch.nn.functional.cosine_similarity(vector.vector, other, dim=0))
    return cosines


def _doubts(rows: Sequence[Row]) -> list[str]:
    """At which layers vectors are no better than chance, one note per method and component."""
    no_better: dict[str, list[int]] = {}
    with_zero: dict[str, list[int]] = {}
    for row in rows:
        name = f"{row['component']} {row['method']}"
        low, high = row["val_effect_size_interval"]
        if row["val_auroc"] <= row["random_auroc_p95"]:
            no_better.setdefault(name, []).append(row["layer"])
        if low <= 0 <= high:
            with_zero.setdefault(name, []).append(row["layer"])
    notes = [f"{name} is no better than random directions at layers {as_ranges(at)}" for name, at in no_better.items()]
    return notes + [
        f"the interval of the effect size of {name} includes zero at layers {as_ranges(at)}"
        for name, at in with_zero.items()
    ]


def _merged(layout: Layout, rows: Sequence[Row]) -> dict[str, Any]:
    """The content of the evaluation file, with earlier rows of the same vectors replaced by new ones."""
    made = [EvaluationRow.model_validate(row) for row in rows]
    kept = {row.key: row for row in [*read_evaluation(layout.evaluation), *made]}
    merged = [kept[key] for key in sorted(kept)]
    best = {trait: row.as_written() for trait, row in best_by_trait(merged).items()}
    return {"all_results": [row.as_written() for row in merged], "best_vectors": best}


def _number(value: torch.Tensor) -> float:
    return float(round_significant(float(value), PROJECTION_DIGITS))
