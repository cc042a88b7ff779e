"""How well projections separate examples: AUROC, Hedges' g with its interval, accuracy.

Scores are projections with examples in the last dimension; `labels` says which of them are positive.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tlcapture.extraction.examples import Sides
from tlcapture.extraction.methods import Labels, LayerVectors
from tlcapture.extraction.readout import Activations

CONFIDENCE = 0.95
_NODES = 128
_ROUNDING = 1e-6  # of the largest score: what float32 leaves where all scores of a side are equal

Scores = Float[Tensor, "*directions n_examples"]
PerDirection = Float[Tensor, "*directions"]


@dataclass(frozen=True, eq=False)
class Separation:
    """How well one direction per layer separates held-out examples; every field has one value per layer.

    `auroc` and `accuracy` are 0 to 1; `effect_size` is Hedges' g, and `interval` the 95 % interval of the effect size,
    `[n_layers, 2]`. Both are NaN with fewer than two examples per side.
    """

    auroc: Float[Tensor, " n_layers"]
    effect_size: Float[Tensor, " n_layers"]
    interval: Float[Tensor, "n_layers 2"]
    accuracy: Float[Tensor, " n_layers"]


def auroc(scores: Scores, labels: Labels) -> PerDirection:
    """The probability that a positive example projects higher than a negative one, ties counting half.

    It is `sklearn.metrics.roc_auc_score`, for many directions at once.

    Source: Hanley and McNeil, "The meaning and use of the area under a ROC curve" (1982).
    """
    return (_twice_below(scores, labels).mean(dim=-1) / (2 * int((~labels).sum()))).float()


def auroc_error(scores: Scores, labels: Labels) -> PerDirection:
    """The standard error of the AUROC, whatever the distributions of the sides; NaN for a side of one example.

    It is `sqrt(var(A) / n_positive + var(B) / n_negative)`: for each positive example, `A` has the share of negative
    ones that project lower, and `B`, for each negative example, the share of positive ones that do.

    Source: DeLong, DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated receiver operating
    characteristic curves" (1988).
    """
    n_positive, n_negative = int(labels.sum()), int((~labels).sum())
    if min(n_positive, n_negative) < 2:
        return torch.full(scores.shape[:-1], torch.nan)
    positive = _twice_below(scores, labels) / (2 * n_negative)
    negative = _twice_below(scores, ~labels) / (2 * n_positive)
    return (positive.var(dim=-1) / n_positive + negative.var(dim=-1) / n_negative).sqrt().float()


def _twice_below(scores: Scores, labels: Labels) -> Float[Tensor, "*directions n_positive"]:
    """Twice the number of negative examples that project lower than each positive one, ties counting half."""
    positive, negative = scores[..., labels].contiguous(), scores[..., ~labels].sort(dim=-1).values
    below, up_to = (torch.searchsorted(negative, positive, right=right) for right in (False, True))
    return (below + up_to).double()


def hedges_g(
    positive: Float[Tensor, "*directions n_positive"], negative: Float[Tensor, "*directions n_negative"]
) -> PerDirection:
    """The difference of means over the pooled standard deviation, times `1 - 3 / (4 f - 1)` for small samples.

    `f` are the degrees of freedom, `n_positive + n_negative - 2`.
    NaN with fewer than two examples per side, and if the standard deviation is 0 up to rounding.

    Source: Hedges, "Distribution theory for Glass's estimator of effect size and related estimators" (1981).
    """
    freedom = positive.shape[-1] + negative.shape[-1] - 2
    if min(positive.shape[-1], negative.shape[-1]) < 2:
        return torch.full(positive.shape[:-1], torch.nan)
    difference = positive.mean(dim=-1) - negative.mean(dim=-1)
    deviation = _pooled_deviation(positive, negative)
    return torch.where(deviation.isfinite(), (1 - 3 / (4 * freedom - 1)) * difference / deviation, torch.nan)


def effect_size_interval(
    positive: Float[Tensor, "n_directions n_positive"],
    negative: Float[Tensor, "n_directions n_negative"],
    *,
    paired: bool,
) -> Float[Tensor, "n_directions 2"]:
    """The 95 % interval of the standardised difference of means, from the noncentral t distribution.

    With pairs (column i of both sides), the difference of means varies with `1 - r`, where r is the correlation within
    pairs. Its error is known with `n - 1` degrees of freedom, as in the paired t test, and the pooled variance with
    `2 (n - 1) / (1 + r ** 2)` (Satterthwaite 1946); of a small effect the first counts, of a large one the second.

    Without pairs, the sides may differ in number and variance: the standard error and the degrees of freedom are those
    of Welch's t test (1947). With those of equal variances, the interval of four examples against twenty of a quarter
    of their standard deviation left out an effect size of 0 in 35 % of cases.

    Source: Cumming and Finch, "A primer on the understanding, use, and calculation of confidence intervals that are
    based on central and noncentral distributions" (2001).
    """
    n_positive, n_negative = positive.shape[-1], negative.shape[-1]
    if min(n_positive, n_negative) < 2:
        return torch.full((len(positive), 2), torch.nan)
    deviation = _pooled_deviation(positive, negative).double().numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        size = (positive.mean(dim=-1) - negative.mean(dim=-1)).double().numpy() / deviation
        scale, freedom = (_of_pairs if paired else _of_sides)(positive, negative, deviation)
    bounds, tail = [], (1 - CONFIDENCE) / 2
    for share in (1 - tail, tail):
        bound = _noncentrality(size * scale, freedom, share)
        if paired:
            of_mean = 1 / (1 + bound**2 / (2 * freedom))  # share of the variance of a size that large
            freedom_there = 1 / (of_mean / (n_positive - 1) + (1 - of_mean) / freedom)
            bound = _noncentrality(size * scale, np.round(freedom_there, 1), share)
        bounds.append(bound / scale)
    return torch.from_numpy(np.stack(bounds, axis=-1)).float()


def _of_pairs(positive: Tensor, negative: Tensor, deviation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By what an effect size of pairs is multiplied to be a t, and the degrees of freedom of the pooled variance."""
    n_pairs = positive.shape[-1]
    apart = positive - positive.mean(dim=-1, keepdim=True), negative - negative.mean(dim=-1, keepdim=True)
    covariance = (apart[0] * apart[1]).double().sum(dim=-1).numpy() / (n_pairs - 1)
    correlation = np.clip(covariance / deviation**2, -0.999, 0.999)
    return np.sqrt(n_pairs / (2 * (1 - correlation))), 2 * (n_pairs - 1) / (1 + correlation**2)


def _of_sides(positive: Tensor, negative: Tensor, deviation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By what an effect size without pairs is multiplied to be Welch's t, and its degrees of freedom."""
    n_positive, n_negative = positive.shape[-1], negative.shape[-1]
    one, other = (side.double().var(dim=-1).numpy() / side.shape[-1] for side in (positive, negative))
    freedom = (one + other) ** 2 / (one**2 / (n_positive - 1) + other**2 / (n_negative - 1))
    return deviation / np.sqrt(one + other), freedom


def projected(vectors: LayerVectors, activations: Activations) -> Float[Tensor, "n_layers n_examples"]:
    """The projections of all examples onto one direction per layer."""
    return torch.einsum("lnd,ld->ln", activations, torch.nn.functional.normalize(vectors.float(), dim=-1))


def separation(
    vectors: LayerVectors, activations: Activations, labels: Labels, held_out: Labels, sides: Sides | None = None
) -> Separation:
    """Separation of the held-out examples by one direction per layer.

    The threshold of the accuracy is halfway between the class means of the training examples.

    Args:
        sides: the held-out examples whose effect size is measured; by default all, without pairs.
    """
    scores = projected(vectors, activations)
    train, train_labels = scores[:, ~held_out], labels[~held_out]
    middle = (train[:, train_labels].mean(dim=1) + train[:, ~train_labels].mean(dim=1)) / 2
    held, held_labels = scores[:, held_out], labels[held_out]
    if sides is None:
        positive, negative, are_pairs = held[:, held_labels], held[:, ~held_labels], False
    else:
        positive, negative, are_pairs = scores[:, sides.positive], scores[:, sides.negative], sides.are_pairs
    return Separation(
        auroc=auroc(held, held_labels),
        effect_size=hedges_g(positive, negative),
        interval=effect_size_interval(positive, negative, paired=are_pairs),
        accuracy=((held > middle[:, None]) == held_labels).float().mean(dim=1),
    )


def _pooled_deviation(positive: Tensor, negative: Tensor) -> Tensor:
    """The pooled standard deviation; NaN where it is no more than rounding."""
    n_positive, n_negative = positive.shape[-1], negative.shape[-1]
    squares = positive.var(dim=-1) * (n_positive - 1) + negative.var(dim=-1) * (n_negative - 1)
    deviation = (squares / (n_positive + n_negative - 2)).sqrt()
    largest = torch.maximum(positive.abs().amax(dim=-1), negative.abs().amax(dim=-1))
    return torch.where(deviation > _ROUNDING * largest, deviation, torch.nan)


def _noncentrality(t: np.ndarray, freedom: np.ndarray, share: float) -> np.ndarray:
    """The noncentrality at which a share of the noncentral t distribution lies below `t`; NaN where `t` is.

    That share is the mean of normal probabilities over the chi distribution of the deviation, by Gauss-Legendre
    quadrature over its quantiles: `scipy.stats.nct` is NaN for noncentralities far from a large `t`.
    """
    from scipy.special import gammaincinv, ndtr

    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    freedom, rows = np.unique(freedom, return_inverse=True)
    with np.errstate(invalid="ignore"):
        chi = np.sqrt(2 * gammaincinv(freedom[:, None] / 2, (nodes + 1) / 2) / freedom[:, None])
        at = t[:, None] * chi[rows]
        low, high = t - 12 - 4 * np.abs(t), t + 12 + 4 * np.abs(t)
        for _ in range(44):
            middle = (low + high) / 2
            below = ndtr(at - middle[:, None]) @ (weights / 2) > share
            low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(np.isfinite(t), (low + high) / 2, np.nan)
