"""Whether vectors tell traits apart: every trait's selected vector on every trait's examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tlcapture.errors import TlcaptureError
from tlcapture.extraction.cross_validation import farthest_of_given
from tlcapture.extraction.evaluation import auroc
from tlcapture.extraction.examples import Examples, read_examples
from tlcapture.extraction.kept_activations import KeptActivations
from tlcapture.names import Trait
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.rounding import PROJECTION_DIGITS, round_number
from tlcapture.traits.evaluation_files import best_by_trait, read_evaluation
from tlcapture.traits.statistics.critical_values import critical_value
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vectors import TraitVector, read_vector


@dataclass(frozen=True)
class CrossTraits:
    """Every trait's vector on every trait's examples.

    Attributes:
        aurocs: `{vector's trait: {examples' trait: auroc}}`; on its own trait of the held-out examples.
        chance: how far from 0.5 the farthest AUROC on another trait's examples is in at most 5 % of cases, if their
            labels are exchanged at random within pairs; `None` without another trait.
    """

    aurocs: Mapping[str, Mapping[str, float]]
    chance: float | None


def cross_traits(layout: Layout) -> CrossTraits:
    """Score each trait's best vector on the examples of each trait.

    Traits of other models, and those whose examples have changed since their activations were kept, are left out.
    """
    vectors = _best_vectors(layout)
    matrix: dict[str, dict[str, float]] = {}
    farthest: list[Tensor] = []
    for seed, (other, examples, kept) in enumerate(_examples_of_all(layout)):
        labels = torch.tensor([item.positive for item in examples.items])
        held_out = torch.tensor([item.held_out for item in examples.items])
        of_others = []
        for trait, vector in sorted(vectors.items()):
            if kept.fingerprint == vector.metadata.get("model_fingerprint"):
                scores = kept.activations[vector.layer] @ torch.nn.functional.normalize(vector.vector, dim=0)
                shown = held_out if other == trait else torch.ones_like(held_out)
                rate = float(auroc(scores[shown], labels[shown]))
                matrix.setdefault(str(trait), {})[str(other)] = round_number(rate, PROJECTION_DIGITS)
                of_others += [scores] * (other != trait)
        if of_others:
            farthest.append(farthest_of_given(torch.stack(of_others), labels, examples.groups, seed=seed))
    return CrossTraits(dict(sorted(matrix.items())), _level(farthest))


def _level(farthest: list[Float[Tensor, " n_labellings"]]) -> float | None:
    if not farthest:
        return None
    return round_number(float(critical_value(torch.stack(farthest).amax(dim=0))), PROJECTION_DIGITS)


def _best_vectors(layout: Layout) -> dict[Trait, TraitVector]:
    found = {}
    for trait, row in best_by_trait(read_evaluation(layout.evaluation)).items():
        files = VectorFiles(layout, Trait.parse(trait))
        if row.component == "residual" and row.layer in files.available("residual").get(row.method, ()):
            found[files.trait] = read_vector(files, "residual", row.method, row.layer)
    return found


def _examples_of_all(layout: Layout) -> Iterator[tuple[Trait, Examples, KeptActivations]]:
    """The traits with examples and activations, sorted, whose activations are read one after another."""
    for trait in layout.traits():
        if (found := _examples(layout, trait)) is not None:
            yield trait, *found


def _examples(layout: Layout, trait: Trait) -> tuple[Examples, KeptActivations] | None:
    metadata = VectorFiles(layout, trait).metadata("residual")
    seed = (metadata.get("split") or {}).get("seed")
    try:
        kept = KeptActivations.read(layout.example_activations(trait, "residual"))
        if kept is None or seed is None or kept.examples != metadata.get("examples"):
            return None
        examples = read_examples(Datasets(layout.root), trait, seed=seed)
    except TlcaptureError:
        return None
    return (examples, kept) if len(examples.items) == kept.activations.shape[1] else None
