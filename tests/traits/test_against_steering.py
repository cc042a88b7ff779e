"""The rank correlation of effect size with steering gain, from files written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from tlcapture.commands.against_steering import _correlation, _Points, against_steering
from tlcapture.names import Trait
from tlcapture.storage.layout import Layout
from tlcapture.traits.change_points import autoregressive
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


def test_the_correlation_is_spearmans_with_the_p_of_shifts(tmp_path: Path) -> None:
    layout, generator = Layout(tmp_path, "exp"), np.random.default_rng(1)
    sizes, gains = generator.normal(size=8), generator.normal(size=8)
    noise: Points = {("probe", n): (float(sizes[n]), float(gains[n])) for n in range(8)}
    strict: Points = {("probe", n): (float(n), 10.0 + n) for n in range(8)}
    write(layout, {TRAITS[0]: noise, TRAITS[1]: strict})
    found = against_steering(layout, TRAITS)
    expected = spearmanr(sizes, gains)
    assert found.by_trait[0].rho == pytest.approx(expected.statistic)
    turned = [np.roll(each, shift) for each in (gains, gains[::-1]) for shift in range(8)]
    exact = np.mean([abs(spearmanr(sizes, each).statistic) >= abs(expected.statistic) - 1e-12 for each in turned])
    assert found.by_trait[0].p == pytest.approx(exact, abs=0.03)
    assert found.by_trait[1].rho == pytest.approx(1)
    assert found.by_trait[1].p == pytest.approx(1 / 8, abs=0.03)  # of all shifts, this one and its mirror image
    pooled = spearmanr([*sizes, *range(8)], [*gains, *range(10, 18)])
    assert (found.pooled.n_vectors, found.pooled.n_layers) == (16, 16)
    assert found.pooled.rho == pytest.approx(pooled.statistic)


def test_series_that_drift_along_the_layers_seldom_correlate_beyond_chance(tmp_path: Path) -> None:
    """With permuted layers, which are not alike, it was 40 %."""
    generator, beyond, draws = np.random.default_rng(0), 0, 60
    for _ in range(draws):
        sizes, gains = autoregressive(0.9, (2, 30), generator).tolist()
        points = _Points("a", ["probe"] * 30, [*range(30)], sizes, gains)
        p = _correlation("a", [points]).p
        assert p is not None
        beyond += p <= 0.05
    assert beyond / draws <= 0.12


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
