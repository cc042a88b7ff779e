"""The calibrations of a trait's vectors on held-out examples, stored in the vectors' metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tlcapture.extraction.calibrating import calibrations
from tlcapture.extraction.examples import Examples
from tlcapture.extraction.kept_activations import KeptActivations
from tlcapture.runs.run import Run
from tlcapture.runs.run_lock import run_lock
from tlcapture.traits.calibration import HELD_OUT, merged_calibrations
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vectors import TraitVector


def held_out_calibrations(
    examples: Examples, kept: KeptActivations, vectors: Mapping[str, Sequence[TraitVector]]
) -> dict[str, dict[str, Any]]:
    """The calibrations of a component's vectors on the held-out examples, by method and layer as text."""
    labels = torch.tensor([item.positive for item in examples.items])
    held_out = torch.tensor([item.held_out for item in examples.items])
    found = {}
    for method, of_method in vectors.items():
        if of_method:
            layers, stacked = [each.layer for each in of_method], torch.stack([each.vector for each in of_method])
            found[method] = calibrations(stacked, kept.activations[layers][:, held_out], labels[held_out], layers)
    return found


def keep_held_out_calibrations(
    run: Run, files: VectorFiles, component: str, found: Mapping[str, Mapping[str, Any]]
) -> None:
    """Add calibrations, by method and layer as text, to the metadata of their vectors."""
    with run_lock(run, f"vectors of {files.trait}"):
        for method, by_layer in found.items():
            metadata = files.metadata(component, method)
            merged = merged_calibrations(metadata.get(HELD_OUT), {method: by_layer})
            files.write_metadata(component, {**metadata, HELD_OUT: merged}, method)
