"""Whether effect size is a proxy for steering: their rank correlation over vectors, on the user's own model.

Vectors at neighbouring layers are alike, so that two series of numbers along the layers correlate by chance. The null
therefore keeps neighbours together: it turns the layers of each trait as a ring, either way round, all methods alike
(a toroidal shift; Upton and Fingleton, "Spatial Data Analysis by Example", 1985).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tlcapture.errors import InputError
from tlcapture.names import Trait
from tlcapture.storage.command_lines import command_line
from tlcapture.storage.layout import Layout
from tlcapture.traits.selection import COHERENT, effect_sizes, steering_runs
from tlcapture.traits.vector_files import VectorFiles

FEWEST_LAYERS = 8
SHIFTS = 2000


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation over vectors.

    Attributes:
        n_vectors: how many vectors have an effect size and a coherent steering run.
        n_layers: the number of their layers, counted once per trait.
        rho: the correlation; `None` for fewer than eight layers, or where nothing varies.
        p: the share of 2,000 random shifts of the gains along the layers of each trait with a correlation as large in
            absolute value; of one trait with n layers it is 1 / n at least where both go steadily up or down. It is at
            most 0.05 in 5 % of unrelated series that drift along the layers as AR(0.9) does, but in 13 % of those that
            drift as AR(0.98), almost a random walk.
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
    generator, starts = np.random.default_rng(0), np.cumsum([0, *(len(each.layers) for each in points)])
    shifted = np.concatenate(
        [start + _shifted(each.methods, generator) for each, start in zip(points, starts, strict=False)], axis=1
    )
    x, y = rankdata(sizes), rankdata(gains)
    x, y = (x - x.mean()) / np.linalg.norm(x - x.mean()), (y - y.mean()) / np.linalg.norm(y - y.mean())
    rho = float(x @ y)
    as_large = np.abs(y[shifted] @ x) >= abs(rho) - 1e-12
    return Correlation(name, len(sizes), n_layers, rho, float((1 + as_large.sum()) / (1 + SHIFTS)))


def _shifted(methods: Sequence[str], generator: np.random.Generator) -> NDArray[np.int64]:
    """The vectors of a trait in `SHIFTS` random orders, `[n_shifts, n_vectors]`, in which neighbours stay together."""
    share, is_reversed = generator.random(SHIFTS), generator.random(SHIFTS) < 0.5
    counts = [methods.count(method) for method in dict.fromkeys(methods)]
    orders = []
    for start, n in zip(np.cumsum([0, *counts]), counts, strict=False):
        turned = (np.arange(n) + (share * n).astype(np.int64)[:, None]) % n
        orders.append(start + np.where(is_reversed[:, None], turned[:, ::-1], turned))
    return np.concatenate(orders, axis=1)
