"""Measuring calibrations: the positions of examples along vectors (see `traits/calibration`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tlcapture.extraction.methods import Labels, LayerVectors
from tlcapture.extraction.readout import Activations
from tlcapture.storage.rounding import PROJECTION_DIGITS, round_significant


def calibrations(
    vectors: LayerVectors, activations: Activations, labels: Labels, layers: Sequence[int]
) -> dict[str, dict[str, float | None]]:
    """The calibration of one vector per layer on examples, by layer as text; empty without both sides.

    `activations` `[n_layers, n_examples, d_model]` are taken at the vectors' layers, which `layers` numbers.
    """
    if labels.all() or not labels.any():
        return {}
    units = torch.nn.functional.normalize(vectors.double(), dim=-1)
    scores = torch.einsum("lnd,ld->ln", activations.double(), units)
    sides = {"negative": scores[:, ~labels], "positive": scores[:, labels]}
    squares = sum((side - side.mean(dim=1, keepdim=True)).square().sum(dim=1) for side in sides.values())
    spare = len(labels) - 2
    has_sd = min(side.shape[1] for side in sides.values()) > 1
    found: dict[str, dict[str, float | None]] = {}
    for row, layer in enumerate(layers):
        means: dict[str, Any] = {f"{name}_mean": _number(side[row].mean()) for name, side in sides.items()}
        sd = _number((torch.as_tensor(squares)[row] / spare).sqrt()) if has_sd else None
        found[str(layer)] = {**means, "pooled_sd": sd}
    return found


def _number(value: torch.Tensor) -> float:
    return float(round_significant(float(value), PROJECTION_DIGITS))
