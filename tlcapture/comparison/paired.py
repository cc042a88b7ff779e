"""Means of paired differences over prompts, their intervals, and their significance.

A mean is significant if all of three tests find it so; its p is the largest of theirs.

- The sign-flip test, of the null hypothesis that the two sides are exchangeable: no prompt favours either, so that its
  difference could as well have the other sign. Signs are flipped, all ways if there are few, and the largest
  standardised mean of all traits is compared, which corrects for the number of traits (the maxT procedure of Westfall
  and Young, "Resampling-Based Multiple Testing", 1993). It is exact, however few prompts there are.
- A t test with its skewness removed (Hall, "On the Removal of Skewness by Transformation", 1992), of the null
  hypothesis that the mean is 0, with Bonferroni's correction. Differences of mean 0 that are skewed are not
  exchangeable, and sign flips alone would take their shape for a mean. Its inversion is the interval.
- Random directions at the same layer: a model that differs moves activations, and with them the projection onto nearly
  any direction. A change of the trait is larger than that of 95 % of random directions, the largest of as many traits,
  each in units of its own directions' root mean square.

No test of a mean holds for all distributions (Bahadur and Savage 1956): where one prompt in ten changes by much and the
others a little to the other side, the sets without a prompt of the rare kind (43 % of sets of eight) show what all of
their prompts do. That is a finding about prompts like these, and rightly one; with a rare prompt among them, hardly any
set shows a change.

In simulations, sign flips alone called skewed differences of mean 0 significant in 3 to 15 % of sets for one trait, and
in 18 to 53 % for any of ten; with the t test it is 2 to 10 % and 4 to 29 %. `benchmarks/paired_null.py` compares
several tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import nan, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05
_FLIPS = 10_000
_MOST_PAIRS_FOR_ALL = 13  # 8,192 ways
_AT_ONCE = 2**10  # flips that are in memory at once,
_MOST_SIGNS = 2**22  # and the most signs, 32 MiB
_TIES = 1e-9  # relative, by which equal statistics may differ by rounding
_ROUNDING = 1e-9  # of the largest value: a standard deviation below it is no more than rounding
_SYMMETRIC = 1e-6  # a smaller skewness counts as none

Values = NDArray[np.float64]


@dataclass(frozen=True)
class PairedDifference:
    """The mean difference over prompts.

    Attributes:
        n: the number of prompts.
        low, high: the 95 % interval, of all traits together; `None` for fewer than two prompts.
        p: the largest p of all tests, corrected for the number of traits; `None` without prompts.
        p_random: the p among random directions, which is one of them; `None` where they are not known.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    p: float | None
    p_random: float | None = None

    @property
    def stands_out(self) -> bool:
        """Whether the mean differs from 0 by all tests, at the level of 5 %."""
        return self.p is not None and self.p <= LEVEL

    def to_json(self) -> dict[str, Any]:
        """All values, and whether the mean stands out."""
        return {
            "n": self.n,
            "mean": self.mean,
            "interval": None if self.low is None else [self.low, self.high],
            "p": self.p,
            "p_random": self.p_random,
            "stands_out": self.stands_out,
        }


def smallest_p(n: int) -> float:
    """The smallest p that sign flips of `n` differences can have."""
    return 2.0 ** (1 - n) if n <= _MOST_PAIRS_FOR_ALL else 1 / (_FLIPS + 1)


def paired_differences(values: Values, random: Sequence[Values | None] = ()) -> list[PairedDifference]:
    """The mean of each column of differences `[n_prompts, n_traits]`; NaN where a prompt has none.

    Args:
        random: the means of random directions `[n_directions]` for each trait; `None` where they are not known.
    """
    if not values.size:
        return [PairedDifference(0, nan, None, None, None)] * values.shape[1]
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    n_traits = max(1, int(filled.any(axis=0).sum()))
    columns = [values[known[:, column], column] for column in range(values.shape[1])]
    by_flips = _by_sign_flips(filled)
    by_directions = _by_random_directions([float(each.mean()) if len(each) else 0.0 for each in columns], random)
    return [_paired(*each, n_traits) for each in zip(columns, by_flips, by_directions, strict=True)]


def interval(values: Values, n_means: int = 1) -> tuple[float, float] | None:
    """The 95 % interval of a mean, by Student's t with its skewness removed; `None` for fewer than two values.

    It is that of Student's t where the values are symmetric about their mean, and is longer on the side of their tail
    where they are not. Intervals of `n_means` means together cover all of them in 95 % (Bonferroni).
    Of 3 to 8 lognormal values it covers the mean in 86 to 90 %, of exponential ones in 91 to 95 %.

    Example:
        interval(np.array([1.0, 2.0, 3.0]))  # (-0.48, 4.48)
        interval(np.array([1.0, 1.0, 4.0]))  # (-0.92, 16.1)
    """
    from scipy.special import stdtrit

    if len(values) < 2:
        return None
    n, mean, deviation, skewness = _moments(values)
    bound = float(stdtrit(n - 1, 1 - LEVEL / 2 / n_means)) / sqrt(n)
    return mean - deviation * _skewed(bound, skewness, n), mean - deviation * _skewed(-bound, skewness, n)


def _paired(own: Values, by_flips: float, by_directions: float | None, n_traits: int) -> PairedDifference:
    if not len(own):
        return PairedDifference(0, nan, None, None, None)
    low, high = interval(own, n_traits) or (None, None)
    p = max(float(by_flips), min(1.0, n_traits * _p_of_mean(own)), by_directions or 0.0)
    return PairedDifference(len(own), float(own.mean()), low, high, p, by_directions)


def _by_random_directions(means: Sequence[float], random: Sequence[Values | None]) -> list[float | None]:
    """The p of each mean among those of random directions, corrected for the number of traits; `None` if not known."""
    known = {number: np.abs(each) for number, each in enumerate(random) if each is not None and each.any()}
    found: list[float | None] = [None] * len(means)
    if not known:
        return found
    drawn = np.stack([*known.values()])
    spread = np.sqrt((drawn**2).mean(axis=1))
    largest = (drawn / spread[:, None]).max(axis=0)
    for number, each in zip(known, spread.tolist(), strict=True):
        n_as_large = int((largest >= abs(means[number]) / each * (1 - _TIES)).sum())
        found[number] = (1 + n_as_large) / (1 + len(largest))
    return found


def _p_of_mean(values: Values) -> float:
    """The two-sided p of a mean by the t test with its skewness removed; 1 for fewer than two values."""
    from scipy.special import stdtr

    if len(values) < 2:
        return 1.0
    n, mean, deviation, skewness = _moments(values)
    if deviation == 0:
        return float(mean == 0)
    return 2 * float(stdtr(n - 1, -abs(_unskewed(mean / deviation, skewness, n)) * sqrt(n)))


def _moments(values: Values) -> tuple[int, float, float, float]:
    """Number, mean, standard deviation and skewness; the last two are 0 where the values differ by rounding alone."""
    mean, apart = float(values.mean()), values - values.mean()
    spread = float(np.sqrt((apart**2).mean()))
    if spread <= _ROUNDING * float(np.abs(values).max()):
        return len(values), mean, 0.0, 0.0
    return len(values), mean, float(values.std(ddof=1)), float(((apart / spread) ** 3).mean())


def _unskewed(mean: float, skewness: float, n: int) -> float:
    """Hall's transformation of a mean in standard deviations, to one whose distribution is less skewed."""
    return mean + skewness * mean**2 / 3 + skewness**2 * mean**3 / 27 + skewness / (6 * n)


def _skewed(value: float, skewness: float, n: int) -> float:
    """The inverse of `_unskewed`."""
    moved = value - skewness / (6 * n)
    return moved if abs(skewness) < _SYMMETRIC else 3 / skewness * (float(np.cbrt(1 + skewness * moved)) - 1)


def _by_sign_flips(values: Values) -> Values:
    """The p of each column by sign flips, corrected for their number.

    The statistic is `|sum(d)| / sqrt(sum(d ** 2))` of a column's differences `d`; its p, the share of flips of all
    columns at once whose largest statistic is as large. For one column, `scipy.stats.permutation_test` has the same p,
    with `permutation_type="samples"`.
    """
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
    at_once = max(1, min(_AT_ONCE, _MOST_SIGNS // n))  # which does not change what is drawn
    for start in range(0, _FLIPS, at_once):
        yield generator.choice([-1.0, 1.0], size=(min(at_once, _FLIPS - start), n))
