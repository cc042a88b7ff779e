"""Means of paired differences over prompts, their intervals, and their significance by sign flips.

If neither side of a pair were special, each difference could as well have the other sign. So the signs are flipped, all
ways if there are few, and the largest standardised mean of all traits is compared: its distribution gives a p for each
trait that is corrected for the number of traits (Westfall and Young 1993, "Resampling-Based Multiple Testing").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05
_FLIPS = 10_000
_MOST_PAIRS_FOR_ALL = 13  # 8,192 ways
_AT_ONCE = 2**10
_TIES = 1e-9  # relative, by which equal statistics may differ by rounding

Values = NDArray[np.float64]


@dataclass(frozen=True)
class PairedDifference:
    """The mean difference over prompts.

    Attributes:
        n: how many prompts there are.
        low, high: its interval of 95 %, by Student's t; `None` for fewer than two prompts.
        p: the share of sign flips in which the mean of any trait is as clear; `None` without prompts.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    p: float | None

    @property
    def stands_out(self) -> bool:
        """Whether the difference is clearer than in 95 % of sign flips."""
        return self.p is not None and self.p <= LEVEL

    def to_json(self) -> dict[str, Any]:
        """All values, and whether the mean stands out."""
        return {
            "n": self.n,
            "mean": self.mean,
            "interval": None if self.low is None else [self.low, self.high],
            "p": self.p,
            "stands_out": self.stands_out,
        }


def smallest_p(n: int) -> float:
    """The smallest p that sign flips of `n` differences can have."""
    return 2.0 ** (1 - n) if n <= _MOST_PAIRS_FOR_ALL else 1 / (_FLIPS + 1)


def paired_differences(values: Values) -> list[PairedDifference]:
    """The mean of each column of differences `[n_prompts, n_traits]`; NaN where a prompt has none."""
    if not values.size:
        return [PairedDifference(0, nan, None, None, None)] * values.shape[1]
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    p = _corrected(filled)
    return [_paired(filled[known[:, column], column], p[column]) for column in range(values.shape[1])]


def interval(values: Values) -> tuple[float, float] | None:
    """The interval of 95 % of a mean, by Student's t; `None` for fewer than two values."""
    from scipy.special import stdtrit

    if len(values) < 2:
        return None
    half = float(stdtrit(len(values) - 1, 1 - LEVEL / 2) * values.std(ddof=1) / np.sqrt(len(values)))
    mean = float(values.mean())
    return mean - half, mean + half


def _paired(own: Values, p: float) -> PairedDifference:
    if not len(own):
        return PairedDifference(0, nan, None, None, None)
    low, high = interval(own) or (None, None)
    return PairedDifference(len(own), float(own.mean()), low, high, float(p))


def _corrected(values: Values) -> Values:
    """The p of each column, corrected for their number."""
    lengths = np.sqrt((values**2).sum(axis=0))
    units = values / np.where(lengths > 0, lengths, 1.0)
    own = np.abs(units.sum(axis=0))
    n_as_clear, n_flips = np.zeros(values.shape[1]), 0
    for signs in _signs(len(values)):
        largest = np.abs(signs @ units).max(axis=1, initial=0.0)
        n_as_clear += (largest[:, None] >= own * (1 - _TIES)).sum(axis=0)
        n_flips += len(signs)
    return n_as_clear / n_flips


def _signs(n: int) -> Iterator[Values]:
    """Signs `[n_flips, n]`: all of them, or the given ones and random others."""
    if n <= _MOST_PAIRS_FOR_ALL:
        numbers = np.arange(2**n)
        yield np.float64(1.0) - 2.0 * ((numbers[:, None] >> np.arange(n)) & 1).astype(np.float64)
        return
    yield np.ones((1, n))
    generator = np.random.default_rng(0)
    for start in range(0, _FLIPS, _AT_ONCE):
        yield generator.choice([-1.0, 1.0], size=(min(_AT_ONCE, _FLIPS - start), n))
