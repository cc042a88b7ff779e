"""The level that a finding has to exceed, from draws of what chance does or from other values. Loads no torch."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.05
REFERENCE_TOKENS = 50  # of a response to a reference prompt


def critical_value(draws: ArrayLike) -> Any:
    """The value that one more such draw exceeds in at most 5 % of cases, over the first axis of `draws`.

    Of `n` draws it is the `0.05 (n + 1)`-th largest, rounded down: of 200 the 10th, which one more exceeds in 10 of 201
    cases. Their 95th percentile, which lies below, would be exceeded in 11. Of fewer than 19 draws it is the largest,
    which one more exceeds more often.

    Example:
        critical_value(range(200))  # 190
    """
    values = np.asarray(draws)
    rank = max(1, int(LEVEL * (len(values) + 1) + 1e-9))
    return np.sort(values, axis=0)[-rank]


def critical_score(n_scores: int, n_others: int | None) -> float:
    """The standard score that the largest of `n_scores` new values exceeds in 5 % of cases.

    Each is scored by the mean and the deviation (of `n - 1`) of `n_others` values of its own, all from one normal
    distribution; `None` means that these are known exactly.
    """
    return _quantile(n_scores, (n_others or 10**6) - 1) * sqrt(1 + 1 / (n_others or 10**6))


def critical_score_within(n_scores: int, n_values: int) -> float:
    """The standard score that the largest of `n_scores` values exceeds in 5 % of cases.

    Each is one of `n_values`, at least three, and is scored by the mean and the deviation (of `n`) of them all, itself
    counted, so that no score is above `sqrt(n_values - 1)` (Thompson, "On a Criterion for the Rejection of
    Observations", 1935).
    """
    quantile = _quantile(n_scores, n_values - 2)
    return quantile * sqrt((n_values - 1) / (n_values - 2 + quantile**2))


def widening(sd: float, deviation: float, rise: float, n_prompt: int, n_response: int) -> float:
    """By which factor a rise varies more over a short response than over the reference prompts' responses.

    Args:
        sd: the deviation of rises over the reference prompts.
        deviation: that of the trajectory along its tokens, of prompt and response; the part of it that the rise makes
            is taken out.
        n_prompt, n_response: the number of these tokens, the first of all not counted.
    """
    n_tokens = max(1, n_prompt + n_response)
    within = max(0.0, deviation**2 - rise**2 * n_prompt * n_response / n_tokens**2)
    more = max(0.0, 1 / max(1, n_response) - 1 / REFERENCE_TOKENS)
    return sqrt(1 + within / sd**2 * more)


def _quantile(n_scores: int, degrees: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 - LEVEL) ** (1 / n_scores)))
