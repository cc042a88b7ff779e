"""How often the interval of an effect size covers the true one, by simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import nct, ttest_rel

from tlcapture.extraction.evaluation import _noncentrality, effect_size_interval

N_PAIRS, TRIALS = 13, 1000


def coverage(effect: float, correlation: float, *, paired: bool) -> float:
    """The share of simulated experiments whose 95 % interval contains the effect size."""
    generator = torch.Generator().manual_seed(int(100 * effect + 10 * correlation))
    noise = torch.randn(2, TRIALS, N_PAIRS, generator=generator)
    negative = noise[0]
    positive = effect + correlation * noise[0] + (1 - correlation**2) ** 0.5 * noise[1]
    low, high = effect_size_interval(positive, negative, paired=paired).unbind(dim=1)
    return float(((low <= effect) & (effect <= high)).float().mean())


@pytest.mark.parametrize("effect", [0.0, 2.0, 6.0])
def test_the_interval_of_thirteen_pairs_covers_the_effect_size(effect: float) -> None:
    found = {correlation: coverage(effect, correlation, paired=True) for correlation in (0.0, 0.5, 0.8)}
    print(f"effect size {effect:g}: coverage by correlation within pairs {found}")
    assert all(0.92 <= share <= 0.985 for share in found.values()), found


@pytest.mark.parametrize("effect", [0.0, 3.0, 6.0])
def test_the_interval_of_unpaired_examples_covers_the_effect_size(effect: float) -> None:
    assert 0.92 <= coverage(effect, 0.0, paired=False) <= 0.98


@pytest.mark.parametrize(("n_positive", "n_negative", "sd"), [(4, 20, 4.0), (20, 4, 4.0), (3, 8, 2.0), (5, 5, 4.0)])
def test_the_interval_of_sides_of_unequal_numbers_and_variances_seldom_leaves_out_0(
    n_positive: int, n_negative: int, sd: float
) -> None:
    generator = torch.Generator().manual_seed(n_positive)
    positive, negative = (torch.randn(600, n, generator=generator) for n in (n_positive, n_negative))
    low, high = effect_size_interval(sd * positive, negative, paired=False).unbind(dim=1)
    assert float(((low > 0) | (high < 0)).float().mean()) <= 0.08


@pytest.mark.parametrize("n_pairs", [3, 5, 8])
def test_the_interval_of_pairs_leaves_out_0_where_the_paired_t_test_does(n_pairs: int) -> None:
    """With the degrees of freedom of the pooled variance alone, five pairs left out an effect of 0 in 8 % of cases."""
    noise = torch.randn(2, 200, n_pairs, generator=torch.Generator().manual_seed(2))
    low, high = effect_size_interval(noise[0], noise[1], paired=True).unbind(dim=1)
    p = ttest_rel(noise[0].double(), noise[1].double(), axis=1).pvalue
    assert (((low > 0) | (high < 0)).numpy() == (p < 0.05)).mean() >= 0.985


@pytest.mark.parametrize("freedom", [4.0, 19.3, 38.0, 70.0])
def test_bounds_are_those_of_the_noncentral_t_distribution_however_large_the_effect(freedom: float) -> None:
    t = np.linspace(-30, 40, 141)
    for share in (0.025, 0.975):
        bound = _noncentrality(t, np.full_like(t, freedom), share)
        assert (np.diff(bound) > 0).all()
        with np.errstate(all="ignore"):
            found = nct.cdf(t, freedom, bound)
        assert np.isfinite(found).mean() > 0.9
        assert np.allclose(found[np.isfinite(found)], share, atol=1e-3)


def test_a_direction_without_variance_has_no_interval() -> None:
    assert effect_size_interval(torch.ones(1, 5), torch.zeros(1, 5), paired=True).isnan().all()
