"""Whether effect size is a proxy for steering: their rank correlation over vectors, on the user's own model.

Vectors at neighbouring layers are alike, and so are the profiles of several traits and methods along the layers, so
that two series of numbers along them correlate by chance. Shuffled or shifted layers do not show how much where a
series drifts, or where traits share it. p is therefore that of a correlation of as many independent numbers as these
are worth, given how alike neighbours are (Bartlett, "Some Aspects of the Time-Correlation Problem in Regard to Tests of
Significance", 1935) and how alike traits and methods are (Bretherton et al., "The Effective Number of Spatial Degrees
of Freedom of a Time-Varying Field", 1999).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tlcapture.errors import InputError
from tlcapture.names import Trait
from tlcapture.storage.experiments.command_lines import command_line
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.selection import COHERENT, effect_sizes, steering_runs
from tlcapture.traits.vector_files import VectorFiles

FEWEST_LAYERS = 8
_MOST_ALIKE = 0.999  # correlation of neighbouring layers


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation over vectors.

    Attributes:
        n_vectors: how many vectors have an effect size and a coherent steering run.
        n_layers: the number of their layers, counted once per trait.
        rho: the correlation; `None` for fewer than eight layers, or where nothing varies.
        p: of the association within traits and methods, by Student's t with the degrees of freedom of an effective
            number of layers; `None` where there is no `rho`, or where nothing varies within them. It is at most 0.05 in
            at most 5 % of unrelated series, white or drifting as a random walk, of one trait or shared by ten.
    """

    trait: str
    n_vectors: int
    n_layers: int
    rho: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Correlations by trait; over all vectors of all traits; and over ranks taken within each trait first."""

    by_trait: list[Correlation]
    pooled: Correlation
    within: Correlation


@dataclass(frozen=True)
class _Points:
    """A trait's vectors: method, layer, effect size and best coherent gain of each, ordered by method and layer."""

    trait: str
    methods: list[str]
    layers: list[int]
    sizes: list[float]
    gains: list[float]

    def ranked(self) -> _Points:
        """With ranks scaled to 0 to 1, so that traits with more vectors do not weigh more."""
        from scipy.stats import rankdata

        scale = max(1, len(self.layers) - 1)
        sizes, gains = (((rankdata(each) - 1) / scale).tolist() for each in (self.sizes, self.gains))
        return _Points(self.trait, self.methods, self.layers, sizes, gains)


def against_steering(layout: Layout, traits: Sequence[Trait]) -> Comparison:
    """Compare effect size with the best coherent gain of steering by the same vector.

    Raises `InputError` if no trait has both.
    """
    points = [_points(VectorFiles(layout, trait)) for trait in traits]
    if not any(each.layers for each in points):
        evaluate, steer = (command_line(layout, name) for name in ("evaluate", "steer"))
        raise InputError(f"no trait has effect sizes and steering results: run '{evaluate}' and '{steer}' first")
    return Comparison(
        [_correlation(each.trait, [each]) for each in points],
        _correlation("pooled", points),
        _correlation("within", [each.ranked() for each in points if len(each.layers) > 1]),
    )


def _points(files: VectorFiles) -> _Points:
    sizes = effect_sizes(files, "residual")
    best: dict[tuple[str, int], float] = {}
    for run in steering_runs(files):
        key = (run.method, run.layer)
        if run.component == "residual" and run.coherence_mean >= COHERENT and run.coefficient >= 0 and key in sizes:
            best[key] = max(best.get(key, run.delta), run.delta)
    keys = sorted(best)
    methods, layers = [method for method, _ in keys], [layer for _, layer in keys]
    return _Points(str(files.trait), methods, layers, [sizes[key] for key in keys], [best[key] for key in keys])


def _correlation(name: str, points: Sequence[_Points]) -> Correlation:
    from scipy.stats import rankdata

    n_layers = sum(len(set(each.layers)) for each in points)
    sizes, gains = (np.array([value for each in points for value in getattr(each, key)]) for key in ("sizes", "gains"))
    if n_layers < FEWEST_LAYERS or min(np.ptp(sizes), np.ptp(gains)) == 0:
        return Correlation(name, len(sizes), n_layers)
    x, y = rankdata(sizes), rankdata(gains)
    rho = float(np.corrcoef(x, y)[0, 1])
    series = [(number, method) for number, each in enumerate(points) for method in each.methods]
    layers = [layer for each in points for layer in each.layers]
    return Correlation(name, len(sizes), n_layers, rho, _p(_within(x, series, layers), _within(y, series, layers)))


def _within(
    values: NDArray[np.float64], series: Sequence[tuple[int, str]], layers: Sequence[int]
) -> NDArray[np.float64]:
    """Each series along the layers less its mean, `[n_series, n_layers]`; NaN at layers that it lacks."""
    rows, columns = [*dict.fromkeys(series)], sorted(set(layers))
    found = np.full((len(rows), len(columns)), np.nan)
    found[[rows.index(each) for each in series], [columns.index(each) for each in layers]] = values
    return found - np.nanmean(found, axis=1, keepdims=True)


def _p(x: NDArray[np.float64], y: NDArray[np.float64]) -> float | None:
    """The two-sided p of the association of series along layers, `[n_series, n_layers]` each, as `_within` makes them.

    With the correlation `a` of neighbouring layers, that of `x` times that of `y`, one series of n layers is worth
    `1 + (n - 1) (1 - a) / (1 + a)` independent numbers. Series count the less, the more alike those of `x` are in the
    same way as those of `y`.
    """
    from scipy.special import stdtr

    alike = _of_neighbours(x) * _of_neighbours(y)
    spare = np.maximum(np.sqrt((~np.isnan(x)).sum(axis=1) - 1), 1)
    x, y = np.nan_to_num(x), np.nan_to_num(y)
    products = (x @ x.T) * (y @ y.T) / np.outer(spare, spare)
    sizes = float((x**2).sum() * (y**2).sum())
    if sizes == 0:
        return None
    variance = (1 + alike) / (1 - alike) * max(float(products.sum()), float(np.trace(products))) / sizes
    freedom, r = 1 / variance - 1, float((x * y).sum()) / sizes**0.5
    if freedom <= 0:
        return 1.0
    return 2 * float(stdtr(freedom, -abs(r) * np.sqrt(freedom / max(1e-12, 1 - r**2))))


def _of_neighbours(series: NDArray[np.float64]) -> float:
    """The correlation of neighbouring layers, at least 0, by the ratio of von Neumann (1941), over all series."""
    steps = [np.diff(row[~np.isnan(row)]) for row in series]
    squares = float(np.nansum(series**2))
    ratio = sum(float((each**2).sum()) for each in steps) / squares if squares else 0.0
    return float(np.clip(1 - ratio / 2, 0, _MOST_ALIKE))
