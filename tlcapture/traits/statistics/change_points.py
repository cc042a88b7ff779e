"""The change point of a response, and how likely one as clear is by chance. Loads no torch.

The change point is the split into two levels with the smallest squared error (CUSUM; Page, "Continuous Inspection
Schemes", 1954; Bai, "Least squares estimation of a shift in linear processes", 1994), at least `MARGIN` tokens from
both ends.

Neighbouring tokens are correlated, and a correlated series drifts: its two halves differ without any change. Its
clarity `T`, the shift in standard deviations of the residuals, is therefore compared with that of simulated series
without a change, of the same length and with the same lag-1 correlation of the residuals. These series are
autoregressive of first order, with coefficients evenly spaced from -0.2 to 0.9. The simulation draws its coefficient
rather than estimating it from the residuals, since the fitted step removes part of the correlation (Andrews, "Exactly
Median-Unbiased Estimation of First Order Autoregressive/Unit Root Models", 1993), more so in short series.
`benchmarks/dynamics_null.py` compares this null with permutations, a plug-in coefficient and self-normalisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlcapture.traits.statistics.critical_values import LEVEL

Values = NDArray[np.floating[Any]]  # float64, or float32 where trajectories are many

MARGIN = 3
SHORTEST = 8  # tokens of a response that can have a change point
COEFFICIENTS = np.linspace(-0.2, 0.9, 12)
_DRAWS = 2000  # per coefficient
_MOST_NUMBERS = 2_400_000  # of a simulation, which has fewer draws for longer series
_FEWEST_DRAWS = 250
_PER_BIN = 1000  # simulated series of similar correlation
_EXACT_LENGTHS = 24  # longer series are compared with simulated ones whose length differs by up to 3 %
_LENGTH_STEP = 1.06
_MANY = 64  # series
_CANCELLING = 0.01  # share of a series's variance
_RANGE = 1e4  # beyond any clarity that noise has


@dataclass(frozen=True, eq=False)
class ChangePoints:
    """The change points of several series, one number each.

    Attributes:
        index: `k`, the first token of the second level, at which `|shift| sqrt(k (m - k) / m)` is largest, for series
            of `m` tokens.
        shift: the mean from `k` on less the mean before.
        p: how often a series without a change has a clarity as large.
        strength: the clarity, in units of the clarity that 5 % of series without a change exceed.

    The clarity is `|shift| sqrt(k (m - k) / m)` in standard deviations of the residuals of the two levels, which have
    `m - 2` degrees of freedom: the largest t of all splits, without the sign.
    """

    index: NDArray[np.int64]
    shift: Values
    p: Values
    strength: Values


def change_points(series: Values) -> ChangePoints:
    """The change point of each row of `series`, `[n_series, n_tokens]`, of at least `SHORTEST` tokens."""
    index, shift, clarity, correlation = _fitted(np.ascontiguousarray(series.T))
    null = _null(_simulated_length(series.shape[1]))
    return ChangePoints(index, shift, null.p(clarity, correlation), clarity / null.threshold(correlation))


def change_strengths(series: Values) -> tuple[NDArray[np.bool_], Values]:
    """Whether each series has a `p` of at most `LEVEL`, and its `strength`, as in `change_points`."""
    clarity, correlation = _clarities(np.ascontiguousarray(series.T))
    null = _null(_simulated_length(series.shape[1]))
    return null.is_exceeded(clarity, correlation), clarity / null.threshold(correlation)


def _fitted(series: Values) -> tuple[NDArray[np.int64], Values, Values, Values]:
    """Index, shift, clarity and the lag-1 correlation of the residuals of each column of `[n_tokens, n_series]`."""
    n_tokens, n_series = series.shape
    split = np.arange(MARGIN, n_tokens - MARGIN + 1)
    weights = _weights(n_tokens).astype(series.dtype)
    centred = series - series[0]  # so that equal numbers are 0 rather than a rounding error
    centred -= centred.mean(axis=0)
    before = _sums(centred[: split[-1]])[MARGIN - 1 :]
    cusum = before * -weights[:, None]
    best = _first_largest(np.abs(cusum))
    size, index = cusum[best, np.arange(n_series)], split[best]
    shift = size * weights[best]
    after = (index / n_tokens).astype(series.dtype) * shift  # the mean of the second level, that of the series being 0
    is_before = np.arange(n_tokens, dtype=np.int32)[:, None] < index.astype(np.int32)
    residuals = centred - (after - is_before.astype(series.dtype) * shift)
    squares = np.einsum("ts,ts->s", residuals, residuals)
    largest = np.maximum(series.max(axis=0), -series.min(axis=0))
    rounding = np.einsum("ts,ts->s", centred, centred) * 1e-20 + np.square(largest) * n_tokens * 1e-30
    is_noisy = squares > rounding
    scale = np.where(is_noisy, squares, 1.0)
    correlation = np.where(is_noisy, np.einsum("ts,ts->s", residuals[1:], residuals[:-1]) / scale, 0.0)
    # A step without noise is as clear as can be; a constant series has no step.
    is_step = is_noisy | (np.square(size) > rounding)
    clarity = np.where(is_noisy, np.abs(size) / np.sqrt(scale / (n_tokens - 2)), np.where(is_step, np.inf, 0.0))
    return index, np.where(is_step, shift, 0), clarity, correlation


def _clarities(series: Values) -> tuple[Values, Values]:
    """Clarity and correlation of each column of `[n_tokens, n_series]`, as `_fitted` finds them, in fewer passes.

    Sums over residuals follow from those over the series, except where they would cancel: there `_fitted` is used.
    """
    n_tokens, n_series = series.shape
    weights = _weights(n_tokens).astype(series.dtype)
    centred = series - series[0]
    centred -= centred.mean(axis=0)
    cusum = _sums(centred[: n_tokens - MARGIN])[MARGIN - 1 :]
    cusum *= weights[:, None]
    best, columns = _first_largest(np.abs(cusum)), np.arange(n_series)
    size, before, index = cusum[best, columns], best.astype(series.dtype) + MARGIN, best + MARGIN
    total = size / weights[best]  # of the tokens before the change, and the opposite of the total after it
    first, second = total / before, -total / (n_tokens - before)
    step = centred[index, columns] - centred[index - 1, columns]
    squares = np.einsum("ts,ts->s", centred, centred)
    residual = squares - np.square(size)
    lagged = np.einsum("ts,ts->s", centred[1:], centred[:-1])
    lagged -= first * (2 * total - centred[0] + step - (before - 1) * first - second)
    lagged += second * (2 * total + centred[-1] + step + (n_tokens - before - 1) * second)
    cancels = ~(residual > squares * _CANCELLING)
    residual[cancels] = 1.0
    clarity, correlation = np.abs(size) / np.sqrt(residual / (n_tokens - 2)), lagged / residual
    if cancels.any():
        _, _, clarity[cancels], correlation[cancels] = _fitted(np.ascontiguousarray(series[:, cancels]))
    return clarity, correlation


def _first_largest(rows: Values) -> NDArray[np.int64]:
    """`argmax` over rows, which NumPy computes column by column: slowly if there are many."""
    n_rows, n_columns = rows.shape
    if n_columns < _MANY:
        return rows.argmax(axis=0)
    number = np.arange(n_rows, 0, -1, dtype=np.min_scalar_type(n_rows))
    return n_rows - ((rows == rows.max(axis=0)) * number[:, None]).max(axis=0).astype(np.int64)


@lru_cache(maxsize=256)
def _weights(n_tokens: int) -> Values:
    """The weights that make the sums of a series before each split comparable."""
    split = np.arange(MARGIN, n_tokens - MARGIN + 1)
    return np.sqrt(n_tokens / (split * (n_tokens - split)))


def _sums(rows: Values) -> Values:
    """The cumulative sums of rows, which NumPy computes column by column: slowly if there are many."""
    if rows.shape[1] < _MANY:
        return np.cumsum(rows, axis=0)
    sums = rows.copy()
    for number in range(1, len(sums)):
        sums[number] += sums[number - 1]
    return sums


def _simulated_length(n_tokens: int) -> int:
    if n_tokens <= _EXACT_LENGTHS:
        return n_tokens
    steps = round(np.log(n_tokens / _EXACT_LENGTHS) / np.log(_LENGTH_STEP))
    return round(_EXACT_LENGTHS * _LENGTH_STEP**steps)


@dataclass(frozen=True, eq=False)
class _Null:
    """Clarities of series without a change, in bins of similar lag-1 correlation of the residuals.

    `correlations` `[n_bins]` increase; `clarities` `[n_bins, n_per_bin]` are sorted.
    """

    correlations: Values
    clarities: Values
    thresholds: Values

    def threshold(self, correlation: Values) -> Values:
        """The clarity that 5 % of series without a change exceed."""
        return np.interp(correlation, self.correlations, self.thresholds)

    def p(self, clarity: Values, correlation: Values) -> Values:
        """The share of series without a change that are as clear, interpolated between bins; never 0."""
        lower, weight = self._between(correlation)
        return (1 - weight) * self._p_in(lower, clarity) + weight * self._p_in(lower + 1, clarity)

    def is_exceeded(self, clarity: Values, correlation: Values) -> NDArray[np.bool_]:
        """Where `p` is at most `LEVEL`; it is computed only where it may be."""
        lower, _ = self._between(correlation)
        found = clarity > self._surely[lower]
        unsure = np.flatnonzero((clarity > self._least[lower]) & ~found)
        found[unsure] = self.p(clarity[unsure], correlation[unsure]) <= LEVEL
        return found

    def _between(self, correlation: Values) -> tuple[NDArray[np.int64], Values]:
        """The lower of the two bins that each correlation lies between, and the weight of the upper one."""
        position = np.interp(correlation, self.correlations, np.arange(len(self.correlations)))
        lower = np.minimum(position.astype(np.int64), len(self.correlations) - 2)
        return lower, position - lower

    def _p_in(self, bins: NDArray[np.int64], clarity: Values) -> Values:
        # One sorted array of all bins: the clarities of each lie in a range of their own.
        n_per_bin = self.clarities.shape[1]
        below = np.searchsorted(self._ranges, bins * _RANGE + np.minimum(clarity, _RANGE / 2)) - bins * n_per_bin
        return np.asarray((n_per_bin - below + 1) / (n_per_bin + 1))

    @cached_property
    def _least(self) -> Values:
        """For each bin but the last, a clarity at which `p` is above `LEVEL` in that bin and in the next one."""
        rank = int((1 - LEVEL) * self.clarities.shape[1]) - 1
        return np.minimum(self.clarities[:-1, rank], self.clarities[1:, rank])

    @cached_property
    def _surely(self) -> Values:
        """For each bin but the last, a clarity beyond which `p` is at most `LEVEL` in that bin and in the next one."""
        rank = self.clarities.shape[1] - int(LEVEL * (self.clarities.shape[1] + 1))
        return np.maximum(self.clarities[:-1, rank], self.clarities[1:, rank])

    @cached_property
    def _ranges(self) -> Values:
        return np.concatenate([_RANGE * number + each for number, each in enumerate(self.clarities)])


@lru_cache(maxsize=256)
def _null(n_tokens: int) -> _Null:
    generator = np.random.default_rng(n_tokens)
    n_draws = int(np.clip(_MOST_NUMBERS // (len(COEFFICIENTS) * n_tokens), _FEWEST_DRAWS, _DRAWS))
    found = [_fitted(autoregressive(each, (n_draws, n_tokens), generator).T)[2:] for each in COEFFICIENTS]
    clarity, correlation = (np.concatenate(values) for values in zip(*found, strict=True))
    order = np.argsort(correlation, kind="stable")
    order = order[len(order) % _PER_BIN // 2 :][: len(order) // _PER_BIN * _PER_BIN].reshape(-1, _PER_BIN)
    clarities = np.sort(clarity[order], axis=1)
    thresholds = np.maximum.accumulate(np.quantile(clarities, 1 - LEVEL, axis=1))
    return _Null(correlation[order].mean(axis=1), clarities, thresholds)


def autoregressive(coefficient: float, shape: tuple[int, int], generator: np.random.Generator) -> Values:
    """Stationary autoregressive series of first order and variance 1, `[n_series, n_tokens]`."""
    noise = generator.standard_normal(shape[::-1])  # by token, so that each step is contiguous
    noise[1:] *= np.sqrt(1 - coefficient**2)
    for token in range(1, shape[1]):
        noise[token] += coefficient * noise[token - 1]
    return noise.T
