"""Which null tells a change of level from chance? A simulation: `python benchmarks/dynamics_null.py`.

Steps of 0, 2, 3 and 5 standard deviations in white noise, and series without a step that are autoregressive of first
order. The step is anywhere at least three tokens from both ends. For each null: how often series without a change
have a change point (at most 7, 10 and 17 % are wanted of white noise, AR(0.5) and AR(0.8) of 50 tokens), how often a
step is found exactly and within one token, and how often leaving out the last token changes what is found.

| null | source |
| --- | --- |
| block permutation | circular blocks of the response, permuted (Politis and Romano 1992) |
| plug-in | a threshold simulated for the residuals' lag-1 correlation, as it is or less biased (Kendall 1954) |
| HAC variance | the long-run variance of the residuals with Bartlett's kernel (Newey and West 1987; Andrews 1991) |
| self-normalised | the CUSUM by its own partial sums on either side (Shao and Zhang 2010), place by least squares |
| simulated | what `tlcapture/traits/statistics/change_points.py` does |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import click
import numpy as np
from numpy.typing import NDArray

from tlcapture.traits.statistics.change_points import MARGIN, autoregressive, change_points
from tlcapture.traits.statistics.critical_values import LEVEL

Series = NDArray[np.floating]
Found = NDArray[np.int64]  # the change point of each series, -1 for none
Finder = Callable[[Series], Found]

COEFFICIENTS = (0.0, 0.5, 0.8)
HEIGHTS = (2.0, 3.0, 5.0)
DRAWS = 4000
PERMUTATIONS = 199
GRID = np.round(np.linspace(-0.3, 0.95, 26), 2)


@cache
def contrasts(n_tokens: int) -> Series:
    """One row per split: the contrast of the levels after and before it, of length 1."""
    splits = np.arange(MARGIN, n_tokens - MARGIN + 1)[:, None]
    scale = np.sqrt(splits * (n_tokens - splits) / n_tokens)
    return scale * np.where(np.arange(n_tokens) < splits, -1 / splits, 1 / (n_tokens - splits))


def fitted(series: Series) -> tuple[Found, Series, Series]:
    """The least-squares split, the size of its contrast, and the residuals."""
    rows = contrasts(series.shape[1])
    scores = series @ rows.T
    best = np.abs(scores).argmax(axis=1)
    size = scores[np.arange(len(series)), best]
    residuals = series - series.mean(axis=1, keepdims=True) - size[:, None] * rows[best]
    return best + MARGIN, np.abs(size), residuals


def clarity(series: Series) -> Series:
    _, size, residuals = fitted(series)
    return size / np.sqrt((residuals**2).mean(axis=1))


def lag_1(residuals: Series) -> Series:
    return (residuals[:, 1:] * residuals[:, :-1]).sum(axis=1) / (residuals**2).sum(axis=1)


def permuted(block: int) -> Finder:
    """Circular permutation of blocks."""

    def find(series: Series) -> Found:
        generator = np.random.default_rng(1)
        at, size, _ = fitted(series)
        n_tokens = series.shape[1]
        larger = np.zeros(len(series))
        blocks = [np.arange(start, min(start + block, n_tokens)) for start in range(0, n_tokens, block)]
        for _ in range(PERMUTATIONS):
            order = np.concatenate([blocks[each] for each in generator.permutation(len(blocks))])
            moved = series[:, (order + generator.integers(n_tokens)) % n_tokens]
            larger += np.abs(moved @ contrasts(n_tokens).T).max(axis=1) >= size
        return np.where((1 + larger) / (1 + PERMUTATIONS) <= LEVEL, at, -1)

    return find


def plugged_in(*, less_biased: bool) -> Finder:
    """A threshold for the lag-1 correlation of the residuals, taken for the coefficient."""

    @cache
    def thresholds(n_tokens: int) -> Series:
        generator = np.random.default_rng(n_tokens)
        drawn = [clarity(autoregressive(each, (DRAWS, n_tokens), generator)) for each in GRID]
        return np.array([np.quantile(each, 1 - LEVEL) for each in drawn])

    def find(series: Series) -> Found:
        at, _, residuals = fitted(series)
        n_tokens, coefficient = series.shape[1], lag_1(residuals)
        if less_biased:
            coefficient = np.clip((coefficient * n_tokens + 2) / (n_tokens - 4), GRID[0], GRID[-1])
        return np.where(clarity(series) > np.interp(coefficient, GRID, thresholds(n_tokens)), at, -1)

    return find


def long_run(series: Series) -> Found:
    """The CUSUM by the square root of the long-run variance, with a threshold for white noise."""

    def statistic(values: Series) -> Series:
        _, size, residuals = fitted(values)
        n_tokens = values.shape[1]
        coefficient = np.clip(lag_1(residuals), -0.97, 0.97)
        width = 1.1447 * (4 * coefficient**2 / (1 - coefficient**2) ** 2 * n_tokens) ** (1 / 3)
        variance = (residuals**2).mean(axis=1)
        for lag in range(1, n_tokens // 2):
            weight = np.clip(1 - lag / (width + 1e-9), 0, None)
            variance = variance + 2 * weight * (residuals[:, lag:] * residuals[:, :-lag]).sum(axis=1) / n_tokens
        return size / np.sqrt(np.maximum(variance, 1e-9))

    null = statistic(np.random.default_rng(2).standard_normal((DRAWS, series.shape[1])))
    return np.where(statistic(series) > np.quantile(null, 1 - LEVEL), fitted(series)[0], -1)


def self_normalised(series: Series) -> Found:
    """Shao and Zhang's test, whose null does not depend on the correlation for long series."""

    def statistic(values: Series) -> Series:
        n_series, n_tokens = values.shape
        largest = np.zeros(n_series)
        for split in range(MARGIN, n_tokens - MARGIN + 1):
            before, after = values[:, :split], values[:, split:]
            shift = (split * (n_tokens - split) / n_tokens**1.5) * (before.mean(axis=1) - after.mean(axis=1))
            one = np.cumsum(before - before.mean(axis=1, keepdims=True), axis=1)
            other = np.cumsum((after - after.mean(axis=1, keepdims=True))[:, ::-1], axis=1)
            spread = ((one**2).sum(axis=1) + (other**2).sum(axis=1)) / n_tokens**2
            largest = np.maximum(largest, shift**2 / spread)
        return largest

    null = statistic(np.random.default_rng(3).standard_normal((DRAWS, series.shape[1])))
    return np.where(statistic(series) > np.quantile(null, 1 - LEVEL), fitted(series)[0], -1)


def simulated(series: Series) -> Found:
    """The null of `tlcapture`."""
    found = change_points(series)
    return np.where(found.p <= LEVEL, found.index, -1)


NULLS: dict[str, Finder] = {
    "block permutation, 3": permuted(3),
    "block permutation, 5": permuted(5),
    "block permutation, 8": permuted(8),
    "block permutation, 12": permuted(12),
    "plug-in": plugged_in(less_biased=False),
    "plug-in, less biased": plugged_in(less_biased=True),
    "HAC variance": long_run,
    "self-normalised": self_normalised,
    "simulated (ours)": simulated,
}


def row(find: Finder, n_tokens: int, trials: int) -> list[str]:
    """The figures of one null."""
    cells = []
    for coefficient in COEFFICIENTS:
        series = autoregressive(coefficient, (trials, n_tokens), np.random.default_rng(10))
        cells.append(f"{(find(series) >= 0).mean():.1%}")
    for height in HEIGHTS:
        generator = np.random.default_rng(20)
        series, at = generator.standard_normal((trials, n_tokens)), generator.integers(MARGIN, n_tokens - 2, trials)
        series += height * (np.arange(n_tokens) >= at[:, None])
        found = find(series)
        near = (found >= 0) & (np.abs(found - at) <= 1)
        changed = (found != find(series[:, :-1])).mean()
        cells.append(f"{(found == at).mean():.0%} / {near.mean():.0%} / {changed:.0%}")
    return cells


@click.command()
@click.option("--trials", default=4000, show_default=True, help="Series of each kind.")
def main(trials: int) -> None:
    """Compare nulls, as a Markdown table for each length."""
    heads = [*(f"false, AR({each:g})" for each in COEFFICIENTS)]
    heads += [f"step of {each:g} sd: exact / within 1 / changed" for each in HEIGHTS]
    for n_tokens in (50, 20):
        click.echo(
            f"\n{n_tokens} tokens, {trials} trials\n\n| null | {' | '.join(heads)} |\n|{' --- |' * (1 + len(heads))}"
        )
        for name, find in NULLS.items():
            click.echo(f"| {name} | {' | '.join(row(find, n_tokens, trials))} |")


if __name__ == "__main__":
    main()
