"""The mean activation of a trait's training examples at every layer, stored beside its vectors.

extraction/{category}/{trait}/vectors/training_mean.pt      float32 [n_layers, d_model]; attn_out_training_mean.pt
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from tlcapture.errors import InputError, VectorError
from tlcapture.names import Trait
from tlcapture.shapes import Vector
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import Written, read_tensors, write_tensors
from tlcapture.storage.tensors import described, is_plain
from tlcapture.traits.missing_vectors import how_to_extract
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vector_sources.packaged import vectors_layout
from tlcapture.traits.vectors import TraitVector


def write_means(files: VectorFiles, component: str, means: Float[Tensor, "n_layers d_model"]) -> Written:
    """Write the mean activations of a trait's training examples."""
    return write_tensors(files.mean_file(component), means.float().clone())


def check_means(layout: Layout, traits: Sequence[Trait], component: str) -> None:
    """Raise `InputError` if traits have vectors of a component but no mean activations, which `extract` stores."""
    files = [VectorFiles(layout, trait) for trait in traits]
    without = [each.trait for each in files if each.available(component) and not each.mean_file(component).is_file()]
    if without:
        raise InputError(
            f"no mean activation to subtract for --centered: {', '.join(map(str, without))}: "
            f"{how_to_extract(layout, without)}, or choose other traits with --traits"
        )


def mean_activation(root: Path, vector: TraitVector) -> Vector:
    """The mean activation of a vector's training examples at its layer.

    Raises `VectorError` if none is stored, naming the command that stores it, or if it does not fit the vector.
    """
    layout = vectors_layout(root, vector.experiment)
    path = VectorFiles(layout, vector.trait).mean_file(vector.component)
    if not path.is_file():
        raise VectorError(
            f"{path}: the mean activation that --centered subtracts is missing: "
            f"{how_to_extract(layout, [vector.trait])}"
        )
    means = read_tensors(path)
    if not is_plain(means) or means.ndim != 2 or not means.isfinite().all():
        raise VectorError(f"{path}: expected a finite tensor [n_layers, d_model], got {described(means)}")
    if vector.layer >= len(means) or means.shape[1] != len(vector.vector):
        raise VectorError(f"{path}: its shape {list(means.shape)} does not fit the vector of layer {vector.layer}")
    return means[vector.layer].float()
