"""Methods of finding a direction: `mean_diff`, `probe`, `gradient`.

Each takes activations of all layers `[n_layers, n_examples, d_model]` and returns one vector per layer,
`[n_layers, d_model]`, that points from the negative to the positive examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tlcapture.extraction.readout import Activations

Labels = Bool[Tensor, " n_examples"]
LayerVectors = Float[Tensor, "n_layers d_model"]

STEPS = 300
_LEARNING_RATE = 0.05
_FIRST, _SECOND = 0.9, 0.999  # decay of the averages of slopes and of their squares


def mean_diff(activations: Activations, labels: Labels, *, seed: int = 0) -> LayerVectors:
    """Mean of the positive minus mean of the negative examples.

    Source: Marks and Tegmark, "The Geometry of Truth" (2023); Turner et al., "Activation Addition" (2023).
    """
    return activations[:, labels].mean(dim=1) - activations[:, ~labels].mean(dim=1)


def probe(activations: Activations, labels: Labels, *, seed: int = 0) -> LayerVectors:
    """The weights of a logistic regression, L2-regularised, in the basis of the activations.

    Activations are centred and divided by one number per layer, so that the regularisation has the same weight
    in all layers and the weights remain a direction in the residual stream.

    Source: Alain and Bengio, "Understanding intermediate layers using linear classifier probes" (2016).
    """
    from sklearn.linear_model import LogisticRegression

    targets = labels.numpy()
    vectors = []
    for layer in _standardised(activations).numpy():
        regression = LogisticRegression(C=1.0, max_iter=1000).fit(layer, targets)
        vectors.append(torch.from_numpy(np.asarray(regression.coef_[0], dtype=np.float32)))
    return torch.stack(vectors)


def gradient(activations: Activations, labels: Labels, *, seed: int = 0) -> LayerVectors:
    """A unit direction trained to separate: gradient descent on the logistic loss of its projection.

    Unlike the probe's weights, the direction has a fixed length, beside a bias and a temperature, so that
    the loss determines only its angle. Each layer trains separately, from a seeded random start.
    """
    n_layers, n_examples, d_model = activations.shape
    signs = (labels.float() * 2 - 1).expand(n_layers, n_examples).unsqueeze(-1)
    features = Features(_standardised(activations), torch.zeros(1, 1), torch.ones(1, 1))
    return descend(features, gradient_start(n_layers, d_model, seed), signs).squeeze(-1)


def gradient_start(n_layers: int, d_model: int, seed: int) -> LayerVectors:
    """Random unit directions, one per layer, from which `gradient` starts."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n_layers, d_model, generator=generator), dim=-1)


@dataclass(frozen=True, eq=False)
class Features:
    """Data `[*batch, n_examples, d]` that every fit sees around a centre and in units of its own.

    `centres` is `[*batch, d, n_fits]` and `units` `[*batch, 1, n_fits]`, or what broadcasts to these shapes.
    """

    data: Float[Tensor, "*batch n_examples d"]
    centres: Tensor
    units: Tensor

    def onto(self, directions: Float[Tensor, "*batch d n_fits"]) -> Float[Tensor, "*batch n_examples n_fits"]:
        """Projections of the examples onto each fit's direction."""
        return (self.data @ directions - (self.centres * directions).sum(dim=-2, keepdim=True)) / self.units

    def combined(self, weights: Float[Tensor, "*batch n_examples n_fits"]) -> Float[Tensor, "*batch d n_fits"]:
        """The weighted sum of the examples, for each fit."""
        return (self.data.mT @ weights - self.centres * weights.sum(dim=-2, keepdim=True)) / self.units


def descend(
    features: Features, start: Float[Tensor, "*batch d"], signs: Float[Tensor, "*batch n_examples n_fits"]
) -> Float[Tensor, "*batch d n_fits"]:
    """The descent of `gradient` for many fits at once; returns unit directions.

    Steps are those of Adam (Kingma and Ba 2015), but with one second moment per direction in place of one per
    coordinate, so that the result does not depend on the basis of the activations.

    Args:
        features: the standardised activations of each fit.
        start: the unit direction from which every fit starts.
        signs: 1 for positive and -1 for negative examples, 0 for examples that a fit does not train on.
    """
    shares = signs / signs.abs().sum(dim=-2, keepdim=True)
    direction = start.unsqueeze(-1).expand(*start.shape, signs.shape[-1])
    bias = log_scale = torch.zeros_like(shares[..., :1, :])
    moments = [_Moments(), _Moments(), _Moments()]
    for _ in range(STEPS):
        length = direction.norm(dim=-2, keepdim=True)
        unit = direction / length
        offsets, scale = features.onto(unit) - bias, log_scale.exp()
        slopes = -shares * torch.sigmoid(-signs * scale * offsets) * scale  # of the loss at each projection
        turn = features.combined(slopes)
        turn = (turn - unit * (unit * turn).sum(dim=-2, keepdim=True)) / length
        direction = direction - moments[0].step(turn)
        bias = bias + moments[1].step(slopes.sum(dim=-2, keepdim=True))
        log_scale = log_scale - moments[2].step((slopes * offsets).sum(dim=-2, keepdim=True))
    return torch.nn.functional.normalize(direction, dim=-2)


class _Moments:
    """Adam's moments of a slope `[..., d, n_fits]`, the second one over all of `d` together."""

    def __init__(self) -> None:
        self._first: Tensor | float = 0.0
        self._second: Tensor | float = 0.0
        self._number = 0

    def step(self, slope: Tensor) -> Tensor:
        self._number += 1
        self._first = _FIRST * self._first + (1 - _FIRST) * slope
        self._second = _SECOND * self._second + (1 - _SECOND) * slope.pow(2).sum(dim=-2, keepdim=True)
        first, second = 1 - _FIRST**self._number, 1 - _SECOND**self._number
        return _LEARNING_RATE * (self._first / first) / ((self._second / second).sqrt() + 1e-12)


def _standardised(activations: Activations) -> Activations:
    """Centred, and scaled by one number per layer to a mean variance of 1."""
    centred = activations - activations.mean(dim=1, keepdim=True)
    scale = centred.pow(2).mean(dim=(1, 2), keepdim=True).sqrt()
    return centred / scale.clamp(min=torch.finfo(scale.dtype).tiny)


FITS: dict[str, Callable[..., LayerVectors]] = {"probe": probe, "mean_diff": mean_diff, "gradient": gradient}
