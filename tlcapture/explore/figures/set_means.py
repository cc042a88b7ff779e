"""Mean trajectories of many captures, whose responses begin together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tlcapture.traits.calibration import Calibration
from tlcapture.traits.projections.token_scores import TokenScores

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SetLine:
    """What the mean of a set needs of one projection, without the scores of other layers.

    `trajectory` is `[n_tokens]`; the other attributes are those of `TokenScores`.
    """

    trait: str
    n_prompt_tokens: int
    trajectory: Values
    calibration: Calibration | None

    @classmethod
    def of(cls, scores: TokenScores) -> SetLine:
        """The line of a projection."""
        return cls(scores.trait, scores.n_prompt_tokens, scores.trajectory.copy(), scores.calibration)

    @property
    def calibrated(self) -> Values:
        """The trajectory on the scale on which the negative examples' mean is 0 and the positive ones' is 1."""
        assert self.calibration is not None
        return self.calibration.calibrated(self.trajectory)


@dataclass(frozen=True, eq=False)
class SetMean:
    """The mean over captures at each position, relative to the start of the response, which is 0.

    Attributes:
        positions, mean, spread, n: `[n_positions]`: the mean of the `n` captures that have the token, NaN of none, and
            their standard deviation, NaN of fewer than two.
    """

    positions: NDArray[np.int64]
    mean: Values
    spread: Values
    n: NDArray[np.int64]


def mean_of(lines: Sequence[SetLine], values: Callable[[SetLine], Values]) -> SetMean:
    """The mean of trajectories, or of other values `[n_tokens]` of lines, of which there is at least one.

    The first token of each, an attention sink, is left out. One line after another is added up: a table of them all
    would be as wide as the longest.
    """
    before = max(line.n_prompt_tokens for line in lines)
    size = before + max(len(line.trajectory) - line.n_prompt_tokens for line in lines)
    n, total, squares = np.zeros(size, np.int64), np.zeros(size), np.zeros(size)

    def placed(line: SetLine) -> tuple[slice, Values]:
        start = before - line.n_prompt_tokens + 1
        found = values(line)[1:]
        return slice(start, start + len(found)), found

    for line in lines:
        place, found = placed(line)
        n[place] += ~np.isnan(found)
        total[place] += np.where(np.isnan(found), 0.0, found)
    mean = np.where(n > 0, total / np.maximum(n, 1), np.nan)
    for line in lines:
        place, found = placed(line)
        squares[place] += np.where(np.isnan(found), 0.0, (found - mean[place]) ** 2)
    spread = np.where(n > 1, np.sqrt(squares / np.maximum(n - 1, 1)), np.nan)
    return SetMean(np.arange(-before, size - before), mean, spread, n)
