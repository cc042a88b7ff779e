"""The mean trajectory of several captures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Line = Sequence[float] | NDArray[np.float64]
Parts = tuple[Line, Line]


def average_trajectory(trajectories: Sequence[Parts]) -> dict[str, Any]:
    """Mean and standard deviation per position over trajectories, each given as `(prompt, response)`.

    Trajectories are aligned at the first response token, which has position 0; prompt tokens have negative positions.
    The first token of every trajectory is excluded, because it is an attention sink. One trajectory after another is
    added up: a table of all of them would be as wide as the longest.

    Returns `position`, `mean`, `sd` (`None` for fewer than two captures) and `n` (captures with a token at the
    position), one entry per position, and `n_captures`.
    """
    before = max(len(prompt) for prompt, _ in trajectories)
    size = before + max(len(response) for _, response in trajectories)
    n, total, squares = np.zeros(size, np.int64), np.zeros(size), np.zeros(size)
    lines = [np.array([*prompt, *response], dtype=np.float64) for prompt, response in trajectories]
    places = [slice(before - len(prompt), before + len(response)) for prompt, response in trajectories]
    for line, place in zip(lines, places, strict=True):
        line[:1] = np.nan
        n[place] += np.isfinite(line)
        total[place] += np.nan_to_num(line)
    mean = total / np.maximum(n, 1)
    for line, place in zip(lines, places, strict=True):
        squares[place] += np.nan_to_num(line - mean[place]) ** 2
    deviation = np.sqrt(squares / np.maximum(n - 1, 1))
    kept = n > 0
    return {
        "position": np.arange(-before, size - before)[kept].tolist(),
        "mean": mean[kept].tolist(),
        "sd": [None if count < 2 else sd for count, sd in zip(n[kept].tolist(), deviation[kept].tolist(), strict=True)],
        "n": n[kept].tolist(),
        "n_captures": len(trajectories),
    }
