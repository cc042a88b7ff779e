"""The rows and the summary that `tlcapture evaluate` writes for one trait and component."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from tlcapture.extraction.baselines import BAG_OF_WORDS, Baseline, text_baselines, verdict
from tlcapture.extraction.cross_validation import (
    OUTER_FOLDS,
    CrossValidated,
    NestedScore,
    cross_validate,
    folds,
    largest_of_fitted,
    largest_of_given,
)
from tlcapture.extraction.evaluation import CONFIDENCE, Separation, projected, separation
from tlcapture.extraction.examples import Examples
from tlcapture.extraction.kept_activations import KeptActivations
from tlcapture.extraction.many_fits import Span
from tlcapture.extraction.methods import FITS
from tlcapture.names import Trait
from tlcapture.shapes import Vector
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import FileState
from tlcapture.storage.rounding import rounded_or_none
from tlcapture.text import layers_named
from tlcapture.traits.evaluation_files import EvaluationRow
from tlcapture.traits.statistics.critical_values import critical_value
from tlcapture.traits.vector_files import IMPORTED, METHODS, VectorFiles
from tlcapture.traits.vectors import TraitVector, read_vector

Row = dict[str, Any]
_TIE = 1e-6  # by which equal AUROCs may differ
TOO_FEW = ": too few examples to tell"  # shuffled labels separate all that are held out, too


@dataclass(frozen=True)
class EvaluatedComponent:
    """The rows of a trait's vectors of one component, and the findings about all of them together.

    `model_fingerprint` identifies the model that read the examples.
    """

    trait: str
    model_fingerprint: str
    rows: list[Row]
    summary: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Common:
    """The data that all rows of a component share."""

    cross_validated: CrossValidated | None
    baselines: Sequence[Baseline]
    n_held_out: int
    traits: Sequence[Trait]


def rows_of(
    layout: Layout,
    examples: Examples,
    kept: KeptActivations,
    vectors: Mapping[str, Sequence[TraitVector]],
    seed: int,
) -> EvaluatedComponent:
    """Score a component's vectors, given by method, on the activations of the trait's examples."""
    labels = torch.tensor([item.positive for item in examples.items])
    held_out = torch.tensor([item.held_out for item in examples.items])
    groups, trait = examples.groups, str(examples.trait)
    span = Span.of(kept.activations, seed=seed)
    grid = {method: [v.layer for v in found] for method, found in vectors.items() if method in FITS and found}
    outer = folds(groups, labels, OUTER_FOLDS, seed=seed)
    baselines = text_baselines(kept.texts, kept.n_tokens, labels, outer)
    largest = largest_of_fitted(span, labels, groups, held_out, grid, seed=seed) if grid else torch.zeros(0)
    try:
        validated = cross_validate(span, labels, groups, grid, seed=seed) if grid else None
    except ValueError:
        validated = None
    common = _Common(validated, baselines, int(held_out.sum()), layout.traits())
    rows: list[Row] = []
    best, sides = 0.0, examples.sides(held_out.nonzero().flatten().tolist())
    for method, found in ((method, found) for method, found in vectors.items() if found):
        stacked = torch.stack([vector.vector for vector in found])
        read = kept.activations[[vector.layer for vector in found]]
        separated = separation(stacked, read, labels, held_out, sides)
        if method in grid:
            null, best = largest, max(best, float(separated.auroc.max()))
        else:
            null = largest_of_given(projected(stacked, read), labels, groups, held_out, seed=seed)
        rows += [_row(layout, vector, number, separated, _p95(null), common) for number, vector in enumerate(found)]
    if validated is None or not rows:
        return EvaluatedComponent(trait, kept.fingerprint, rows)
    first = Baseline.of("layer 0", validated.layer_0, labels, outer)
    p = (1 + int((largest >= best - _TIE).sum())) / (1 + len(largest))
    compared = [*baselines, first]
    judged = verdict(validated.nested, compared, labels, groups, p, seed=seed)
    summary = {
        **_nested_record(validated.nested),
        "baselines": {each.name: rounded_or_none(each.auroc) for each in compared},
        "gain": rounded_or_none(judged.gain),
        "gain_interval": [rounded_or_none(bound) for bound in judged.interval],
        "p": rounded_or_none(p),
        "verdict": judged.text + (TOO_FEW if p > 1 - CONFIDENCE and _p95(largest) == 1 else ""),
    }
    return EvaluatedComponent(trait, kept.fingerprint, rows, summary)


def _p95(null: torch.Tensor) -> float | None:
    return float(critical_value(null)) if len(null) else None


def _nested_record(nested: NestedScore) -> dict[str, Any]:
    return {
        "nested_auroc": rounded_or_none(nested.auroc),
        "nested_sd": rounded_or_none(nested.auroc_sd),
        "nested_effect_size": rounded_or_none(nested.effect_size),
        "chosen_layers": dict(Counter(f"{method} {layer}" for method, layer in nested.chosen)),
    }


def doubts(rows: Sequence[EvaluationRow]) -> list[str]:
    """At which layers vectors are no better than chance, one note per method and component.

    Where shuffled labels separate the held-out examples perfectly, no vector can be better, and intervals are wide: one
    note per component.
    """
    perfect = dict.fromkeys(row.component for row in rows if (row.null_auroc_p95 or 0) >= 1)
    no_better: dict[str, list[int]] = {}
    with_zero: dict[str, list[int]] = {}
    undefined: dict[str, list[int]] = {}
    for row in rows:
        name = f"{row.component} {row.method}"
        low, high = row.val_effect_size_interval or (None, None)
        if low is None or high is None:
            undefined.setdefault(name, []).append(row.layer)
        elif low <= 0 <= high and row.component not in perfect:
            with_zero.setdefault(name, []).append(row.layer)
        if row.null_auroc_p95 is None or row.val_auroc is None or row.component in perfect:
            continue
        if row.val_auroc <= row.null_auroc_p95:
            no_better.setdefault(name, []).append(row.layer)
    notes = [
        f"too few examples to tell whether {name} vectors are better than chance: a vector of shuffled labels, too, "
        "separates all held-out examples; write more pairs"
        for name in perfect
    ]
    notes += [
        f"{name} is no better than the best vector of shuffled labels at {layers_named(at)}"
        for name, at in no_better.items()
    ]
    notes += [
        f"the effect size of {name} is undefined at {layers_named(at)}: it needs two held-out examples a side that "
        "differ"
        for name, at in undefined.items()
    ]
    return notes + [
        f"the interval of the effect size of {name} includes zero at {layers_named(at)}"
        for name, at in with_zero.items()
    ]


def _row(
    layout: Layout, vector: TraitVector, number: int, found: Separation, null_p95: float | None, common: _Common
) -> Row:
    effect = rounded_or_none(found.effect_size[number])
    validated = common.cross_validated
    has_fits = validated is not None and vector.method in validated.auroc
    lengths = [each.auroc for each in common.baselines if each.name != BAG_OF_WORDS]
    words = next(each.auroc for each in common.baselines if each.name == BAG_OF_WORDS)
    row = {
        "trait": str(vector.trait),
        "method": vector.method,
        "layer": vector.layer,
        "component": vector.component,
        "vector_digest": VectorFiles(layout, vector.trait).digest(vector.component, vector.method, vector.layer),
        "val_accuracy": rounded_or_none(found.accuracy[number]),
        "val_auroc": rounded_or_none(found.auroc[number]),
        "val_effect_size": effect,
        "val_effect_size_interval": [rounded_or_none(bound) for bound in found.interval[number]],
        "polarity": None if effect is None else "positive" if effect > 0 else "negative",
        "n_val": common.n_held_out,
        "null_auroc_p95": rounded_or_none(null_p95),
        "bag_of_words_auroc": rounded_or_none(words),
        "length_auroc": rounded_or_none(max(lengths)),
        "cosine_to_methods": _cosines(
            vector, [(m, vector.trait, m) for m in (*METHODS, IMPORTED) if m != vector.method], layout
        ),
        "cosine_to_traits": _cosines(
            vector, [(str(t), t, vector.method) for t in common.traits if t != vector.trait], layout
        ),
    }
    if has_fits and validated is not None:
        row |= {
            "cv_auroc": rounded_or_none(validated.auroc[vector.method][vector.layer]),
            "cv_effect_size": rounded_or_none(validated.effect_size[vector.method][vector.layer]),
            "layer0_auroc": rounded_or_none(validated.auroc[vector.method][0]),
        }
    return row


def _cosines(vector: TraitVector, others: Sequence[tuple[str, Trait, str]], layout: Layout) -> dict[str, float | None]:
    """Cosines to the existing vectors of other methods or traits at the same layer."""
    cosines = {}
    for name, trait, method in others:
        folder = VectorFiles(layout, trait)
        path = folder.file(vector.component, method, vector.layer)
        if path.is_file():
            other = _read(folder, vector.component, method, vector.layer, FileState.of(path.stat()))
            if other.shape == vector.vector.shape:
                cosines[name] = rounded_or_none(torch.nn.functional.cosine_similarity(vector.vector, other, dim=0))
    return cosines


@lru_cache(maxsize=2**14)  # 256 MiB at a width of 4,096
def _read(files: VectorFiles, component: str, method: str, layer: int, _state: FileState) -> Vector:
    """A vector, which is read once for all traits that it is compared with."""
    return read_vector(files, component, method, layer).vector
