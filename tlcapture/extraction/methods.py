"""Methods of finding a direction: `mean_diff`, `probe`, `gradient`.

Each takes activations of all layers `[n_layers, n_examples, d_model]` and returns one vector per layer,
`[n_layers, d_model]`, that points from the negative to the positive examples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tlcapture.extraction.readout import Activations

Labels = Bool[Tensor, " n_examples"]
LayerVectors = Float[Tensor, "n_layers d_model"]

_STEPS = 300
_LEARNING_RATE = 0.05


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
    the loss determines only its angle. All layers train together, from a seeded random start.
    """
    n_layers, _, d_model = activations.shape
    data = _standardised(activations)
    signs = labels.float() * 2 - 1
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        direction = torch.randn(n_layers, d_model, generator=generator).requires_grad_()
        bias = torch.zeros(n_layers, 1, requires_grad=True)
        log_scale = torch.zeros(n_layers, 1, requires_grad=True)
        optimiser = torch.optim.Adam([direction, bias, log_scale], lr=_LEARNING_RATE)
        for _ in range(_STEPS):
            optimiser.zero_grad()
            unit = torch.nn.functional.normalize(direction, dim=-1)
            margins = (torch.einsum("lnd,ld->ln", data, unit) - bias) * log_scale.exp() * signs
            # Layers share no parameter, so the sum of their losses trains each separately.
            torch.nn.functional.softplus(-margins).mean(dim=-1).sum().backward()
            optimiser.step()
    return torch.nn.functional.normalize(direction.detach(), dim=-1)


def _standardised(activations: Activations) -> Activations:
    """Centred, and scaled by one number per layer to a mean variance of 1."""
    centred = activations - activations.mean(dim=1, keepdim=True)
    scale = centred.pow(2).mean(dim=(1, 2), keepdim=True).sqrt()
    return centred / scale.clamp(min=torch.finfo(scale.dtype).tiny)


FITS: dict[str, Callable[..., LayerVectors]] = {"probe": probe, "mean_diff": mean_diff, "gradient": gradient}
