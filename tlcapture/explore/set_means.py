"""Mean trajectories of many captures, whose responses begin together."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def aligned(trajectories: Sequence[tuple[ArrayLike, int]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Positions relative to the start of the response, and trajectories `[n_prompts, n_positions]`, NaN elsewhere.

    Trajectories come with their numbers of prompt tokens. The first token of each, an attention sink, is left out.
    """
    lines = [(np.array(line, dtype=np.float64), n_prompt) for line, n_prompt in trajectories]
    before = max(n_prompt for _, n_prompt in lines)
    after = max(len(line) - n_prompt for line, n_prompt in lines)
    rows = np.full((len(lines), before + after), np.nan)
    for row, (line, n_prompt) in zip(rows, lines, strict=True):
        line[:1] = np.nan
        row[before - n_prompt : before - n_prompt + len(line)] = line
    return np.arange(-before, after), rows


def mean_and_spread(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation over prompts at each position; NaN for a mean of none and a deviation of one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of positions with too few values
        return np.nanmean(rows, axis=0), np.nanstd(rows, axis=0, ddof=1)
