"""The mean trajectory of many captures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Parts = tuple[Sequence[float], Sequence[float]]


def average_trajectory(lines: Sequence[Parts]) -> dict[str, Any]:
    """Mean and standard deviation position by position over trajectories `(prompt, response)`.

    Positions count from the first response token, prompts being negative, so that all responses begin
    together. `n` tells how many captures have a token there; a deviation needs two. Each line's first
    token, an attention sink whose projection dwarfs all others, is left out.
    """
    before = max(len(prompt) for prompt, _ in lines)
    after = max(len(response) for _, response in lines)
    table = np.full((len(lines), before + after), np.nan)
    for row, (prompt, response) in zip(table, lines, strict=True):
        row[before - len(prompt) : before + len(response)] = [*prompt, *response]
        row[before - len(prompt)] = np.nan
    there = np.isfinite(table)
    n = there.sum(axis=0)
    kept = n > 0
    mean = np.where(there, table, 0).sum(axis=0) / np.maximum(n, 1)
    squares = (np.where(there, table - mean, 0) ** 2).sum(axis=0)
    deviation = np.sqrt(squares / np.maximum(n - 1, 1))
    return {
        "position": (np.arange(before + after) - before)[kept].tolist(),
        "mean": mean[kept].tolist(),
        "sd": [None if count < 2 else float(sd) for count, sd in zip(n[kept], deviation[kept], strict=True)],
        "n": n[kept].tolist(),
        "n_captures": len(lines),
    }
