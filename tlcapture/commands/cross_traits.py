"""Whether vectors tell traits apart: every trait's selected vector on every trait's examples."""

from __future__ import annotations

import torch

from tlcapture.errors import TlcaptureError
from tlcapture.extraction.evaluation import auroc
from tlcapture.extraction.examples import Examples, read_examples
from tlcapture.extraction.kept_activations import KeptActivations
from tlcapture.names import Trait
from tlcapture.storage.datasets import Datasets
from tlcapture.storage.layout import Layout
from tlcapture.storage.rounding import PROJECTION_DIGITS, round_number
from tlcapture.traits.evaluation_files import best_by_trait, read_evaluation
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vectors import TraitVector, read_vector


def cross_trait_aurocs(layout: Layout) -> dict[str, dict[str, float]]:
    """AUROC of each trait's best vector on the examples of each trait: `{vector's trait: {examples' trait: auroc}}`.

    On its own trait only held-out examples count. Traits of other models, and those whose examples have changed since
    their activations were kept, are left out.
    """
    vectors = _best_vectors(layout)
    examples = {trait: found for trait in layout.traits() if (found := _examples(layout, trait)) is not None}
    matrix: dict[str, dict[str, float]] = {}
    for trait, vector in sorted(vectors.items()):
        row = {}
        for other, (listed, kept) in sorted(examples.items()):
            if kept.fingerprint == vector.metadata.get("model_fingerprint"):
                row[str(other)] = _auroc(vector, listed, kept, only_held_out=other == trait)
        if row:
            matrix[str(trait)] = row
    return matrix


def _best_vectors(layout: Layout) -> dict[Trait, TraitVector]:
    found = {}
    for trait, row in best_by_trait(read_evaluation(layout.evaluation)).items():
        files = VectorFiles(layout, Trait.parse(trait))
        if row.component == "residual" and row.layer in files.available("residual").get(row.method, ()):
            found[files.trait] = read_vector(files, "residual", row.method, row.layer)
    return found


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


def _auroc(vector: TraitVector, examples: Examples, kept: KeptActivations, *, only_held_out: bool) -> float:
    labels = torch.tensor([item.positive for item in examples.items])
    shown = torch.tensor([item.held_out or not only_held_out for item in examples.items])
    scores = kept.activations[vector.layer] @ torch.nn.functional.normalize(vector.vector, dim=0)
    return round_number(float(auroc(scores[shown], labels[shown])), PROJECTION_DIGITS)
