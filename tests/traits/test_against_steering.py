"""The rank correlation of effect size with steering gain, from files written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from tlcapture.commands.against_steering import _p, against_steering
from tlcapture.names import Trait
from tlcapture.storage.experiments.layout import Layout
from tlcapture.traits.statistics.change_points import autoregressive
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vectors import write_vector

TRAITS = (Trait("tone", "loud"), Trait("tone", "warm"))
Points = dict[tuple[str, int], tuple[float, float]]  # effect size and gain by method and layer


def write(layout: Layout, by_trait: dict[Trait, Points]) -> None:
    rows = []
    for trait, points in by_trait.items():
        files, runs = VectorFiles(layout, trait), []
        for (method, layer), (size, gain) in points.items():
            write_vector(files, "residual", method, layer, torch.ones(4))
            rows.append({"trait": str(trait), "method": method, "layer": layer, "val_effect_size": size})
            config = {"layers": [layer], "methods": [method], "coefficients": [0.1]}
            runs.append({"config": config, "result": {"trait_mean": 40 + gain, "coherence_mean": 90.0}})
        path = layout.steering(trait)
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"baseline": {"trait_mean": 40.0}, "runs": runs}))
    layout.evaluation.write_text(json.dumps({"all_results": rows}))


def test_two_methods_at_a_layer_are_two_vectors_at_one_layer(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "exp")
    points: Points = {(m, layer): (float(layer), float(layer)) for m in ("probe", "mean_diff") for layer in range(4)}
    write(layout, {TRAITS[0]: points})
    (found,) = against_steering(layout, TRAITS[:1]).by_trait
    assert (found.n_vectors, found.n_layers, found.rho, found.p) == (8, 4, None, None)


def test_the_correlation_is_spearmans_with_the_p_of_the_layers_that_it_is_worth(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "exp")
    sizes, gains = [3.0, 8, 1, 6, 2, 7, 4, 5], [2.0, 6, 5, 7, 1, 8, 3, 4]  # neighbours are not alike
    noise: Points = {("probe", n): (sizes[n], gains[n]) for n in range(8)}
    strict: Points = {("probe", n): (float(n), 10.0 + n) for n in range(8)}
    write(layout, {TRAITS[0]: noise, TRAITS[1]: strict})
    found = against_steering(layout, TRAITS)
    expected = spearmanr(sizes, gains)
    assert found.by_trait[0].rho == pytest.approx(expected.statistic)
    assert found.by_trait[0].p == pytest.approx(expected.pvalue)
    assert found.by_trait[1].rho == pytest.approx(1)
    assert found.by_trait[1].p == 1  # two series that go steadily up are worth no two independent numbers
    pooled = spearmanr([*sizes, *range(8)], [*gains, *range(10, 18)])
    assert (found.pooled.n_vectors, found.pooled.n_layers) == (16, 16)
    assert found.pooled.rho == pytest.approx(pooled.statistic)


@pytest.mark.parametrize("n_traits", [1, 10])
@pytest.mark.parametrize("coefficient", [0.0, 0.5, 0.9, 0.98])
def test_series_that_drift_along_the_layers_seldom_correlate_beyond_chance(coefficient: float, n_traits: int) -> None:
    """By shifts of the layers it was 13 % of single traits, and 41 to 57 % of ten that share a profile."""
    generator, draws = np.random.default_rng(0), 200
    own = autoregressive(coefficient, (draws * 2 * n_traits, 30), generator).reshape(draws, 2, n_traits, 30)
    series = 2 * own[:, :, :1] + own
    series -= series.mean(axis=-1, keepdims=True)
    beyond = sum((_p(sizes, gains) or 1.0) <= 0.05 for sizes, gains in series)
    assert beyond / draws <= 0.05 + 2.6 * (0.05 * 0.95 / draws) ** 0.5


def test_methods_that_are_alike_count_as_one_vector() -> None:
    generator = np.random.default_rng(3)
    sizes, gains = generator.normal(size=(2, 1, 20))
    sizes, gains = sizes - sizes.mean(), gains - gains.mean()
    alone = _p(sizes, gains)
    assert _p(np.repeat(sizes, 3, axis=0), np.repeat(gains, 3, axis=0)) == pytest.approx(alone)
    missing = np.vstack([sizes, np.full((1, 20), np.nan)])
    missing[1, 4] = 0.0  # a method at one layer
    assert _p(missing, np.vstack([gains, missing[1:]])) == pytest.approx(alone)


def test_a_relation_that_many_layers_show_is_found() -> None:
    generator, found = np.random.default_rng(4), 0
    for _ in range(50):
        sizes = autoregressive(0.9, (1, 30), generator)
        gains = 2 * sizes + autoregressive(0.9, (1, 30), generator)
        found += (_p(sizes - sizes.mean(), gains - gains.mean()) or 1.0) <= 0.05
    assert found >= 35


def test_a_difference_between_traits_alone_is_no_correlation_of_vectors(tmp_path: Path) -> None:
    """Larger sizes and gains of one trait correlate when pooled; permuting within traits keeps that in the null."""
    layout, generator = Layout(tmp_path, "exp"), np.random.default_rng(2)
    by_trait: dict[Trait, Points] = {
        trait: {("probe", n): (far + generator.normal(), far + generator.normal()) for n in range(8)}
        for trait, far in zip(TRAITS, (0.0, 20.0), strict=True)
    }
    write(layout, by_trait)
    found = against_steering(layout, TRAITS)
    assert found.pooled.rho is not None
    assert found.pooled.rho > 0.6
    assert found.pooled.p is not None
    assert found.pooled.p > 0.05
