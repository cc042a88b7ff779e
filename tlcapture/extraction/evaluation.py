"""How well directions separate held-out examples: AUROC, Cohen's d with its interval, accuracy, a random baseline.

`auroc` and `cohens_d` take projections, one row per direction; `separation` and `random_baseline` take activations
`[n_layers, n_examples, d_model]` and which examples are positive and held out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tlcapture.extraction.methods import Labels, LayerVectors
from tlcapture.extraction.readout import Activations

RESAMPLES = 1000
RANDOM_DIRECTIONS = 200
CONFIDENCE = 0.95

Scores = Float[Tensor, "*directions n_examples"]
PerDirection = Float[Tensor, "*directions"]


@dataclass(frozen=True)
class Separation:
    """How well one direction per layer separates held-out examples; every field has one value per layer.

    `auroc` and `accuracy` are 0 to 1; `effect_size` is Cohen's d, and `interval` its 95 % interval `[n_layers, 2]`.
    """

    auroc: Float[Tensor, " n_layers"]
    effect_size: Float[Tensor, " n_layers"]
    interval: Float[Tensor, "n_layers 2"]
    accuracy: Float[Tensor, " n_layers"]


@dataclass(frozen=True)
class RandomBaseline:
    """AUROC of random directions, oriented by the training examples: mean and 95th percentile per layer."""

    mean: Float[Tensor, " n_layers"]
    p95: Float[Tensor, " n_layers"]


def auroc(scores: Scores, labels: Labels) -> PerDirection:
    """The probability that a positive example projects higher than a negative one, ties counting half.

    Source: Hanley and McNeil, "The meaning and use of the area under a ROC curve" (1982).
    """
    positive, negative = scores[..., labels].unsqueeze(-1), scores[..., ~labels].unsqueeze(-2)
    wins = (positive > negative).float() + 0.5 * (positive == negative).float()
    return wins.mean(dim=(-2, -1))


def cohens_d(
    positive: Float[Tensor, "*directions n_positive"], negative: Float[Tensor, "*directions n_negative"]
) -> PerDirection:
    """The difference of means over the pooled standard deviation; 0 where the standard deviation is 0.

    Source: Cohen, "Statistical Power Analysis for the Behavioral Sciences" (1988).
    """
    n_positive, n_negative = positive.shape[-1], negative.shape[-1]
    squares = positive.var(dim=-1) * (n_positive - 1) + negative.var(dim=-1) * (n_negative - 1)
    pooled = (squares / (n_positive + n_negative - 2)).sqrt()
    difference = positive.mean(dim=-1) - negative.mean(dim=-1)
    return torch.where(pooled > 0, difference / pooled.clamp(min=1e-30), torch.zeros_like(difference))


def separation(
    vectors: LayerVectors, activations: Activations, labels: Labels, held_out: Labels, *, seed: int = 0
) -> Separation:
    """Separation of the held-out examples by one direction per layer.

    The threshold of the accuracy is halfway between the class means of the training examples, and the
    interval contains 95 % of the effect sizes of a bootstrap over the held-out ones (percentiles of 1,000
    stratified resamples; Efron, "Bootstrap Methods", 1979).
    """
    scores = _project(vectors, activations)
    train, train_labels = scores[:, ~held_out], labels[~held_out]
    middle = (train[:, train_labels].mean(dim=1) + train[:, ~train_labels].mean(dim=1)) / 2
    held, held_labels = scores[:, held_out], labels[held_out]
    positive, negative = held[:, held_labels], held[:, ~held_labels]
    return Separation(
        auroc=auroc(held, held_labels),
        effect_size=cohens_d(positive, negative),
        interval=_bootstrap(positive, negative, seed),
        accuracy=((held > middle[:, None]) == held_labels).float().mean(dim=1),
    )


def random_baseline(activations: Activations, labels: Labels, held_out: Labels, *, seed: int = 0) -> RandomBaseline:
    """The AUROC of random directions on the held-out examples: a chance level for `separation`."""
    n_layers, _, d_model = activations.shape
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(RANDOM_DIRECTIONS, d_model, generator=generator)
    found = []
    for layer in range(n_layers):
        scores = directions @ activations[layer].T
        train, train_labels = scores[:, ~held_out], labels[~held_out]
        sign = (train[:, train_labels].mean(dim=1) - train[:, ~train_labels].mean(dim=1)).sign()
        found.append(auroc(scores[:, held_out] * sign[:, None], labels[held_out]))
    rates = torch.stack(found)
    return RandomBaseline(rates.mean(dim=1), rates.quantile(CONFIDENCE, dim=1))


def _project(vectors: LayerVectors, activations: Activations) -> Float[Tensor, "n_layers n_examples"]:
    unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
    return torch.einsum("lnd,ld->ln", activations, unit)


def _bootstrap(
    positive: Float[Tensor, "n_layers n_positive"], negative: Float[Tensor, "n_layers n_negative"], seed: int
) -> Float[Tensor, "n_layers 2"]:
    generator = torch.Generator().manual_seed(seed)

    def resample(scores: Tensor) -> Tensor:
        drawn = torch.randint(scores.shape[1], (RESAMPLES, scores.shape[1]), generator=generator)
        return scores[:, drawn]

    sizes = cohens_d(resample(positive), resample(negative))
    tail = (1 - CONFIDENCE) / 2
    return sizes.quantile(torch.tensor([tail, 1 - tail]), dim=1).T
