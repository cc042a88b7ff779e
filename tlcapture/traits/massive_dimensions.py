"""Massive dimensions: the few dimensions of the residual stream that carry most of its norm in many models.

A dimension is massive if its root mean square over tokens is at least ten times that of the median dimension. The
first token, an attention sink, is left out.

Source: Timkey and van Schijndel, "All Bark and No Bite: Rogue Dimensions in Transformer Language Models Obscure
Representational Quality" (2021); Sun et al., "Massive Activations in Large Language Models" (2024).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tlcapture.shapes import Vector

TIMES_THE_MEDIAN = 10.0

Activations = Float[Tensor, "n_tokens d_model"]


def massive_dimensions(activations: Activations) -> tuple[int, ...]:
    """The massive dimensions of activations of a sequence, largest first; none for a single token."""
    sizes = activations[1:].double().square().mean(dim=0).sqrt()
    if len(activations) < 2:
        return ()
    found = torch.nonzero((sizes >= TIMES_THE_MEDIAN * sizes.median()) & (sizes > 0)).flatten()
    return tuple(found[sizes[found].argsort(descending=True)].tolist())


def norm_share(activations: Activations, dimensions: tuple[int, ...]) -> float:
    """The share of the squared norm that dimensions carry, over all tokens except the first."""
    squares = activations[1:].double().square().sum(dim=0)
    total = float(squares.sum())
    return float(squares[list(dimensions)].sum()) / total if total else 0.0


def massive_share(activations: Activations, direction: Vector) -> tuple[tuple[int, ...], float]:
    """The massive dimensions, and the share of the variance of a projection over tokens that they carry.

    A projection is the sum of a part on the massive dimensions and a rest; the share of a part is its covariance with
    the whole, divided by the variance of the whole, and shares add up to 1 (one may be negative).
    """
    dimensions = massive_dimensions(activations)
    parts = activations[1:].double() * direction.double()
    whole = parts.sum(dim=1)
    massive = parts[:, list(dimensions)].sum(dim=1)
    deviation = whole - whole.mean()
    variance = float(deviation @ deviation)
    return dimensions, float((massive @ deviation) / variance) if variance else 0.0
