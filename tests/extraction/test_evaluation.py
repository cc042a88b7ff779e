"""Evaluation against scikit-learn, closed forms, noise and planted directions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from tests.extraction.test_extraction import planted
from tlcapture.extraction.evaluation import auroc, auroc_error, effect_size_interval, hedges_g, separation

numbers = st.lists(st.integers(-5, 5), min_size=4, max_size=30)


@given(numbers, st.randoms(use_true_random=False))
def test_auroc_equals_scikit_learns_with_ties(values: list[int], random: object) -> None:
    labels = torch.tensor([random.random() < 0.5 for _ in values])  # type: ignore[attr-defined]
    labels[0], labels[1] = True, False
    scores = torch.tensor(values, dtype=torch.float32)
    assert float(auroc(scores, labels)) == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)


def test_auroc_of_many_examples_needs_no_memory_for_their_pairs() -> None:
    n = 400_000  # whose pairs would take 40 GB
    scores = torch.arange(n, dtype=torch.float32)
    assert float(auroc(scores, scores % 2 == 1)) == pytest.approx((n / 2 + 1) / n)


def test_hedges_g_is_the_corrected_difference_in_pooled_standard_deviations() -> None:
    positive, negative = torch.tensor([2.0, 4.0, 6.0]), torch.tensor([1.0, 2.0, 3.0, 2.0])
    pooled = ((2 * 4.0 + 3 * (2 / 3)) / 5) ** 0.5
    correction = 1 - 3 / (4 * 5 - 1)
    assert float(hedges_g(positive, negative)) == pytest.approx(correction * (4 - 2) / pooled)
    assert float(hedges_g(negative, positive)) == pytest.approx(-correction * (4 - 2) / pooled)


def test_an_effect_size_of_too_few_or_equal_examples_is_undefined() -> None:
    one, many, equal = torch.randn(3, 1), torch.randn(3, 4), torch.ones(3, 4)
    for positive, negative in ((one, many), (many, one), (equal, equal)):
        assert hedges_g(positive, negative).isnan().all()
        assert effect_size_interval(positive, negative, paired=False).isnan().all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_an_effect_size_of_rounding_errors_is_undefined(scale: float) -> None:
    rounding = 1 + torch.randn(3, 8) * 1e-7
    positive, negative = 3.0 * rounding[:, :4] * scale, 2.0 * rounding[:, 4:] * scale
    assert hedges_g(positive, negative).isnan().all()
    assert effect_size_interval(positive, negative, paired=True).isnan().all()
    spread = torch.randn(3, 4) * 1e-4 * scale  # a thousand times as much is a deviation
    assert hedges_g(positive + spread, negative).isfinite().all()


def test_a_planted_direction_separates() -> None:
    activations, labels, direction = planted(n=200)
    held_out = torch.arange(200) % 5 == 0
    labels = torch.arange(200) % 2 == 0
    found = separation(direction, activations, labels, held_out)
    assert (found.auroc > 0.95).all()
    assert (found.accuracy > 0.9).all()
    # Two unit-variance classes 4 apart: an effect size of 4, within the error of 20 against 20.
    assert ((found.effect_size - 4).abs() < 1.5).all()
    assert (found.interval[:, 0] < found.effect_size).all()
    assert (found.effect_size < found.interval[:, 1]).all()
    assert (found.interval[:, 0] > 0).all()


def test_the_interval_of_noise_contains_zero() -> None:
    torch.manual_seed(3)
    activations, labels = torch.randn(40, 200, 16), torch.arange(200) % 2 == 0
    found = separation(torch.randn(40, 16), activations, labels, torch.arange(200) % 5 < 2)
    contains = (found.interval[:, 0] < 0) & (found.interval[:, 1] > 0)
    assert contains.float().mean() > 0.85


def test_reversing_a_direction_reverses_its_measures() -> None:
    activations, labels, direction = planted(n=100)
    held_out = torch.arange(100) % 4 < 2
    there, back = (separation(d, activations, labels, held_out) for d in (direction, -direction))
    assert torch.allclose(there.auroc, 1 - back.auroc, atol=1e-5)
    assert torch.allclose(there.effect_size, -back.effect_size, atol=1e-4)


def test_the_error_of_an_auroc_is_its_deviation_over_samples_of_unequal_sides() -> None:
    scores = torch.randn(4000, 30, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) < 8
    scores[:, labels] = 2.5 * scores[:, labels] + 0.5
    assert float(auroc_error(scores, labels).mean()) == pytest.approx(float(auroc(scores, labels).std()), rel=0.05)
    assert auroc_error(scores, torch.arange(30) < 1).isnan().all()
