"""Whether a projection shows how a model was steered: a test of the projection without a judge.

The responses of a steered model are read by the unsteered one and projected onto the vector. Within each question, the
rank correlation (Spearman 1904) of a response's mean projection with its coefficient says whether the projection
follows; comparing within questions takes their topics out.

The null hypothesis is that the vector is one of many directions onto which the same responses could be projected, and
that what it wrote is read along it no better than along them. Vectors without a meaning may reject it too: half of the
random combinations of responses that steered the embedded model did (`benchmarks/monitoring_null.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tlcapture.shapes import Vector, Vectors

FEWEST = 8  # responses; among fewer any correlation comes about by chance
RANDOM_VECTORS = 99  # onto which projecting costs next to nothing: p is at most 0.05 in exactly 5 of 100 cases
_ROUNDING = 1e-9  # by which means of the same correlations may differ


@dataclass(frozen=True)
class Monitoring:
    """How projections of steered responses follow the coefficient.

    Attributes:
        coefficients: the coefficients, 0 for the unsteered model.
        projections: the mean over questions of the responses' mean projections, by coefficient; `None` without any.
        rank_correlation: the mean over questions of the rank correlation of projection with coefficient; a question
            whose projections do not vary counts as 0. `None` for fewer than 8 responses.
        null: the same for random vectors.
        p: the share of random vectors, the vector itself counted with them, that follow at least as well; of this
            vector alone, not corrected for the number of vectors.
        n: the number of responses.
    """

    coefficients: list[float]
    projections: list[float | None]
    rank_correlation: float | None
    null: list[float]
    p: float | None
    n: int


def monitoring(
    coefficients: Sequence[float],
    activations: Float[Tensor, "n_coefficients n_questions d_model"],
    vector: Vector,
    random: Vectors,
) -> Monitoring:
    """Compare projections onto a vector and onto random ones, all taken as directions.

    Args:
        activations: each response's mean activation at the vector's layer, in the unsteered model; NaN for an empty
            response, which is left out.
    """
    unit = torch.nn.functional.normalize(torch.cat([vector[None].float(), random]), dim=-1)
    projected = torch.einsum("cqd,vd->vcq", activations.float(), unit).numpy()
    n = int((~np.isnan(projected[0])).sum())
    means = [None if np.isnan(each).all() else float(np.nanmean(each)) for each in projected[0]]
    followed = _followed(np.array(coefficients), projected) if n >= FEWEST else None
    if followed is None:
        return Monitoring(list(coefficients), means, None, [], None, n)
    p = float((followed >= followed[0] - _ROUNDING).mean())
    return Monitoring(list(coefficients), means, float(followed[0]), followed[1:].tolist(), p, n)


def _followed(coefficients: np.ndarray, projected: np.ndarray) -> np.ndarray | None:
    """The mean over questions of the rank correlation, by vector, as `scipy.stats.spearmanr` has it for one.

    `projected` is `[n_vectors, n_coefficients, n_questions]`; `None` where no question has two responses.
    """
    from scipy.stats import rankdata

    found = []
    for column in np.moveaxis(projected, 2, 0):
        seen = ~np.isnan(column[0])
        if seen.sum() > 1:
            middle = (seen.sum() + 1) / 2
            ranks, expected = rankdata(column[:, seen], axis=1) - middle, rankdata(coefficients[seen]) - middle
            lengths = np.sqrt((ranks**2).sum(axis=1) * (expected**2).sum())
            found.append((ranks @ expected) / np.where(lengths > 0, lengths, np.inf))
    return np.mean(found, axis=0) if found else None
