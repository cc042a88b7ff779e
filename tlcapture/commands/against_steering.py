"""Whether effect size is a proxy for steering: their rank correlation over layers, on the user's own model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tlcapture.errors import InputError
from tlcapture.names import Trait
from tlcapture.storage.layout import Layout
from tlcapture.traits.selection import COHERENT, effect_sizes, steering_runs
from tlcapture.traits.vector_files import VectorFiles

_FEWEST = 3


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation over `n` layers; `None` for fewer than three, or where nothing varies."""

    trait: str
    n: int
    rho: float | None


@dataclass(frozen=True)
class Comparison:
    """Correlations by trait; over all layers of all traits; and over ranks taken within each trait first."""

    by_trait: list[Correlation]
    pooled: Correlation
    within: Correlation


def against_steering(layout: Layout, traits: Sequence[Trait]) -> Comparison:
    """Compare held-out effect size with the best coherent gain of steering by the same vector, over layers.

    Raises `InputError` if no trait has both.
    """
    by_trait, pooled, within = [], [], []
    for trait in traits:
        pairs = _pairs(VectorFiles(layout, trait))
        by_trait.append(_correlation(str(trait), pairs))
        pooled += pairs
        if len(pairs) >= _FEWEST:
            ranks = (_ranks([pair[column] for pair in pairs]) for column in (0, 1))
            within += list(zip(*ranks, strict=True))
    if not pooled:
        raise InputError("no trait has effect sizes and steering results: run 'tlcapture evaluate' and 'steer' first")
    return Comparison(by_trait, _correlation("pooled", pooled), _correlation("within", within))


def _pairs(folder: VectorFiles) -> list[tuple[float, float]]:
    sizes = effect_sizes(folder, "residual")
    best: dict[tuple[str, int], float] = {}
    for run in steering_runs(folder):
        key = (run.method, run.layer)
        if run.component == "residual" and run.coherence_mean >= COHERENT and key in sizes:
            best[key] = max(best.get(key, run.delta), run.delta)
    return [(sizes[key], best[key]) for key in sorted(best)]


def _correlation(name: str, pairs: Sequence[tuple[float, float]]) -> Correlation:
    from scipy.stats import spearmanr

    columns = list(zip(*pairs, strict=True))
    if len(pairs) < _FEWEST or any(len(set(column)) == 1 for column in columns):
        return Correlation(name, len(pairs), None)
    return Correlation(name, len(pairs), float(spearmanr(*columns).statistic))


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks scaled to 0 to 1, so that traits with more layers do not weigh more."""
    from scipy.stats import rankdata

    return [(float(rank) - 1) / (len(values) - 1) for rank in rankdata(values)]
