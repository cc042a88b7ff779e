"""Which test tells a change of a mean from chance? A simulation: `python benchmarks/paired_null.py`.

Differences over prompts of mean 0, of several distributions: how often any of several traits is called significant at
5 %; and normal ones with a mean of some standard deviations in the first trait: how often that trait is.

| test | source |
| --- | --- |
| Student's t | with Bonferroni's correction |
| sign flips | the largest t of all traits, over all or 10,000 flips (Westfall and Young 1993) |
| bootstrap-t | equal-tailed, with Bonferroni's correction (Efron and Tibshirani 1993) |
| Hall's t | Student's with its skewness removed (Hall 1992), with Bonferroni's correction |
| both | the larger p of sign flips and Hall's t: what `tlcapture/comparison/paired.py` does, beside random directions |
"""

from __future__ import annotations

from collections.abc import Callable

import click
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tlcapture.comparison.paired import LEVEL, _by_sign_flips, _p_of_mean, paired_differences

Values = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, int]], Values]

RESAMPLES = 1999


def _ten_percent(generator: np.random.Generator, shape: tuple[int, int]) -> Values:
    """One prompt in ten changes by much, the others a little to the other side."""
    return np.where(generator.random(shape) < 0.1, 9.0, -1.0) + 0.5 * generator.standard_normal(shape)


DRAWS: dict[str, Draw] = {
    "normal": lambda generator, shape: generator.standard_normal(shape),
    "t, 3 degrees": lambda generator, shape: generator.standard_t(3, shape),
    "ties": lambda generator, shape: generator.integers(-2, 3, shape).astype(float),
    "unequal variance": lambda g, shape: g.standard_normal(shape) * np.exp(g.standard_normal((shape[0], 1))),
    "exponential": lambda generator, shape: generator.exponential(size=shape) - 1,
    "chi-squared": lambda generator, shape: generator.standard_normal(shape) ** 2 - 1,
    "lognormal": lambda generator, shape: generator.lognormal(size=shape) - np.exp(0.5),
    "one prompt in ten": _ten_percent,
}
SHAPES = ((6, 1), (8, 1), (12, 1), (20, 1), (50, 1), (8, 10), (12, 10), (20, 10), (50, 10))


def bootstrap_t(values: Values, generator: np.random.Generator) -> Values:
    n = len(values)
    drawn = (values - values.mean(axis=0))[generator.integers(n, size=(RESAMPLES, n))]
    spread = np.maximum(drawn.std(axis=1, ddof=1), 1e-12)
    t, own = drawn.mean(axis=1) / spread, values.mean(axis=0) / values.std(axis=0, ddof=1)
    below, above = ((1 + each.sum(axis=0)) / (1 + RESAMPLES) for each in (t <= own, t >= own))
    return np.asarray(2 * np.minimum(below, above))


def p_values(values: Values, generator: np.random.Generator) -> dict[str, Values]:
    """The p of each trait by each test, corrected for their number."""
    n_traits = values.shape[1]
    return {
        "Student's t": n_traits * stats.ttest_1samp(values, 0).pvalue,
        "sign flips": _by_sign_flips(values),
        "bootstrap-t": n_traits * bootstrap_t(values, generator),
        "Hall's t": n_traits * np.array([_p_of_mean(each) for each in values.T]),
        "both": np.array([each.p for each in paired_differences(values)]),
    }


def shares(draw: Draw, shape: tuple[int, int], mean: float, trials: int) -> dict[str, float]:
    """How often each test finds the first trait to change, or without a change any trait."""
    generator, found = np.random.default_rng(0), dict[str, int]()
    for _ in range(trials):
        values = draw(generator, shape)
        values[:, 0] += mean
        with np.errstate(divide="ignore"):  # of equal values
            tests = p_values(values, generator)
        for name, p in tests.items():
            found[name] = found.get(name, 0) + bool((p[0] if mean else p.min()) <= LEVEL)
    return {name: count / trials for name, count in found.items()}


@click.command()
@click.option("--trials", default=1000, show_default=True, help="Sets of prompts of each kind.")
def main(trials: int) -> None:
    """Print, for each number of prompts and traits, a Markdown table of the tests."""
    for shape in SHAPES:
        rows = {name: shares(draw, shape, 0.0, trials) for name, draw in DRAWS.items()}
        rows |= {f"mean {mean:g} sd": shares(DRAWS["normal"], shape, mean, trials) for mean in (1.0, 2.0, 4.0)}
        names = list(next(iter(rows.values())))
        click.echo(f"\n{shape[0]} prompts, {shape[1]} traits\n\n| | {' | '.join(names)} |")
        click.echo(f"|{' --- |' * (1 + len(names))}")
        for name, row in rows.items():
            click.echo(f"| {name} | {' | '.join(f'{row[each]:.1%}' for each in names)} |")


if __name__ == "__main__":
    main()
