"""Whether a projection shows how a model was steered: a test of the projection without a judge.

The responses of a steered model are read by the unsteered one and projected onto the vector. Within each question, the
rank correlation (Spearman 1904) of a response's mean projection with its coefficient says whether the projection
follows; comparing within questions takes their topics out.
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
        p: the share of random vectors, the vector itself counted with them, that follow at least as well.
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
    followed = [_followed(np.array(coefficients), each) for each in projected] if n >= FEWEST else []
    found = [each for each in followed if each is not None]
    if not found or len(found) < len(followed):
        return Monitoring(list(coefficients), means, None, [], None, n)
    p = sum(each >= found[0] - _ROUNDING for each in found) / len(found)
    return Monitoring(list(coefficients), means, found[0], found[1:], p, n)


def _followed(coefficients: np.ndarray, projections: np.ndarray) -> float | None:
    """The mean over questions of the rank correlation; `projections` is `[n_coefficients, n_questions]`."""
    from scipy.stats import rankdata

    found = []
    for column in projections.T:
        seen = ~np.isnan(column)
        if seen.sum() > 1:
            ranks = rankdata(column[seen]) - (seen.sum() + 1) / 2, rankdata(coefficients[seen]) - (seen.sum() + 1) / 2
            length = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
            found.append(float((ranks[0] * ranks[1]).sum() / length) if length > 0 else 0.0)
    return float(np.mean(found)) if found else None
