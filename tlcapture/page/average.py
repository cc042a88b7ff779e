"""The mean trajectory of several captures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Parts = tuple[Sequence[float], Sequence[float]]


def average_trajectory(trajectories: Sequence[Parts]) -> dict[str, Any]:
    """Mean and standard deviation per position over trajectories, each given as `(prompt, response)`.

    Trajectories are aligned at the first response token, which has position 0; prompt tokens have negative positions.
    The first token of every trajectory is excluded, because it is an attention sink.

    Returns `position`, `mean`, `sd` (`None` for fewer than two captures) and `n` (captures with a token at the
    position), one entry per position, and `n_captures`.
    """
    before = max(len(prompt) for prompt, _ in trajectories)
    after = max(len(response) for _, response in trajectories)
    table = np.full((len(trajectories), before + after), np.nan)
    for row, (prompt, response) in zip(table, trajectories, strict=True):
        row[before - len(prompt) : before + len(response)] = [*prompt, *response]
        row[before - len(prompt)] = np.nan
    present = np.isfinite(table)
    n = present.sum(axis=0)
    kept = n > 0
    mean = np.where(present, table, 0).sum(axis=0) / np.maximum(n, 1)
    squares = (np.where(present, table - mean, 0) ** 2).sum(axis=0)
    deviation = np.sqrt(squares / np.maximum(n - 1, 1))
    return {
        "position": (np.arange(before + after) - before)[kept].tolist(),
        "mean": mean[kept].tolist(),
        "sd": [None if count < 2 else float(sd) for count, sd in zip(n[kept], deviation[kept], strict=True)],
        "n": n[kept].tolist(),
        "n_captures": len(trajectories),
    }
