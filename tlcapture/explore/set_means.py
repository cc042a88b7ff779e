"""Mean trajectories of many captures, whose responses begin together."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tlcapture.traits.token_scores import TokenScores


def aligned(projections: Sequence[TokenScores], *, calibrated: bool) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Positions relative to the start of the response, and trajectories `[n_prompts, n_positions]`, NaN elsewhere.

    The first token of each prompt, an attention sink, is left out.
    """
    before = max(each.n_prompt_tokens for each in projections)
    after = max(len(each.tokens) - each.n_prompt_tokens for each in projections)
    rows = np.full((len(projections), before + after), np.nan)
    for row, each in zip(rows, projections, strict=True):
        scaled = each.calibrated if calibrated else None
        line = np.array(each.trajectory if scaled is None else scaled, dtype=np.float64)
        line[0] = np.nan
        start = before - each.n_prompt_tokens
        row[start : start + len(line)] = line
    return np.arange(-before, after), rows


def mean_and_spread(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation over prompts at each position; NaN where fewer than two prompts have a value."""
    several = (~np.isnan(rows)).sum(axis=0) >= 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of positions where no prompt has a value
        mean, spread = np.nanmean(rows, axis=0), np.nanstd(rows, axis=0, ddof=1)
    return np.where(several, mean, np.nan), np.where(several, spread, np.nan)
