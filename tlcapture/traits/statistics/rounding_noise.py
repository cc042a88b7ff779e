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
from tlcapture.views.kept_tokens import Positions

_TIMES = 4.0  # what was ablated is rounded more than once
_FLOAT32 = 1e-5  # of float32, whose matrix products are rounded more often; far below any real variation
_HALVES = (torch.bfloat16, torch.float16)
_MOST = _TIMES * torch.finfo(torch.bfloat16).eps / 2


def still_from(
    trajectories: Float[Tensor, "n_vectors n_held"],
    vectors: Sequence[TraitVector],
    activations: Mapping[int, Float[Tensor, "n_held d_model"]],
    held: Positions,
) -> dict[int, int]:
    """The token of the capture from which each row is still: the second one, or the first of the response.

    Rows that are not still are left out. `activations` are those at each vector's layer, which the trajectories are
    the projections of, both of the held tokens alone.
    """
    whole = _still(trajectories, vectors, activations, 1)
    response = _still(trajectories, vectors, activations, max(1, len(held.prompt)))
    return dict.fromkeys(response, max(1, held.n_prompt)) | dict.fromkeys(whole, 1)


def constant_from(trajectory: Float[Tensor, " n_tokens"], start: int | None) -> Float[Tensor, " n_tokens"]:
    """The mean of all tokens from `start` on in place of each of them; missing ones (NaN) stay so.

    It is one of float32, so that the mean of any number of them is equal to it. `None` changes nothing.
    """
    if start is None:
        return trajectory
    rest = trajectory[start:]
    return torch.cat([trajectory[:start], torch.where(rest.isnan(), rest, rest.nanmean().float().double())])


def _still(
    trajectories: Tensor, vectors: Sequence[TraitVector], activations: Mapping[int, Tensor], start: int
) -> list[int]:
    """The rows that vary by no more than rounding from `start` on; a single value is not known to be still."""
    if trajectories.shape[1] - start < 2:
        return []
    varies = trajectories[:, start:].double().std(dim=1, correction=0).tolist()
    rest = {layer: values[start:] for layer, values in activations.items()}
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
