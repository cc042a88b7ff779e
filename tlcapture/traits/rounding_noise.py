"""Trajectories that vary by no more than the rounding of activations, as those onto a direction that was ablated.

Rounding a token's activations `h` in a format with the unit roundoff `u` changes its projection onto the unit vector
`v` by some `u ||h * v||`. Statistics of such changes would describe rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tlcapture.traits.vectors import TraitVector

_TIMES = 4.0  # what was ablated is rounded more than once
_FLOAT32 = 1e-5  # of float32, whose matrix products are rounded more often; far below any real variation
_HALVES = (torch.bfloat16, torch.float16)
_MOST = _TIMES * torch.finfo(torch.bfloat16).eps / 2


def still_trajectories(
    trajectories: Float[Tensor, "n_vectors n_tokens"],
    vectors: Sequence[TraitVector],
    activations: Mapping[int, Float[Tensor, "n_tokens d_model"]],
) -> list[int]:
    """The rows of the trajectories that vary by no more than rounding, their first token left out.

    `activations` are those at each vector's layer, which the trajectories are the projections of. Of fewer than three
    tokens none is known to be still: a single value does not vary.
    """
    if trajectories.shape[1] < 3:
        return []
    varies = trajectories[:, 1:].double().std(dim=1, correction=0).tolist()
    rest = {layer: values[1:] for layer, values in activations.items()}
    longest = {layer: float(values.float().norm(dim=1).max()) for layer, values in rest.items() if len(values)}
    found = []
    for row, vector in enumerate(vectors):
        # Most trajectories vary by more than any rounding of activations of this length.
        if varies[row] <= _MOST * longest.get(vector.layer, -1.0):
            values = rest[vector.layer]
            scale = (values.double() * vector.unit.double().to(values.device)).norm(dim=1).square().mean().sqrt()
            if varies[row] <= _rounding(values) * float(scale):
                found.append(row)
    return found


def _rounding(values: Tensor) -> float:
    """The relative rounding of activations, whatever format they are stored in."""
    for dtype in _HALVES:
        if values.dtype == dtype or torch.equal(values.to(dtype).to(values.dtype), values):
            return _TIMES * torch.finfo(dtype).eps / 2
    return _FLOAT32
