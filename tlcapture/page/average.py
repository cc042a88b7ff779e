"""The mean trajectory of several captures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tlcapture.explore.set_means import aligned, mean_and_spread

Parts = tuple[Sequence[float], Sequence[float]]


def average_trajectory(trajectories: Sequence[Parts]) -> dict[str, Any]:
    """Mean and standard deviation per position over trajectories, each given as `(prompt, response)`.

    Trajectories are aligned at the first response token, which has position 0; prompt tokens have negative positions.
    The first token of every trajectory is excluded, because it is an attention sink.

    Returns `position`, `mean`, `sd` (`None` for fewer than two captures) and `n` (captures with a token at the
    position), one entry per position, and `n_captures`.
    """
    positions, rows = aligned([([*prompt, *response], len(prompt)) for prompt, response in trajectories])
    mean, deviation = mean_and_spread(rows)
    n = np.isfinite(rows).sum(axis=0)
    kept = n > 0
    return {
        "position": positions[kept].tolist(),
        "mean": mean[kept].tolist(),
        "sd": [None if np.isnan(sd) else sd for sd in deviation[kept].tolist()],
        "n": n[kept].tolist(),
        "n_captures": len(trajectories),
    }
