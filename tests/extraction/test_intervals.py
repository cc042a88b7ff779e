"""How often the interval of an effect size covers the true one, by simulation."""

from __future__ import annotations

import pytest
import torch

from tlcapture.extraction.evaluation import effect_size_interval

N_PAIRS, TRIALS = 13, 2000


def coverage(effect: float, correlation: float, *, paired: bool) -> float:
    """The share of simulated experiments whose 95 % interval contains the effect size."""
    generator = torch.Generator().manual_seed(int(100 * effect + 10 * correlation))
    noise = torch.randn(2, TRIALS, N_PAIRS, generator=generator)
    negative = noise[0]
    positive = effect + correlation * noise[0] + (1 - correlation**2) ** 0.5 * noise[1]
    low, high = effect_size_interval(positive, negative, paired=paired).unbind(dim=1)
    return float(((low <= effect) & (effect <= high)).float().mean())


@pytest.mark.parametrize("effect", [0.0, 1.0, 2.0, 4.0, 6.0])
def test_the_interval_of_thirteen_pairs_covers_the_effect_size(effect: float) -> None:
    found = {correlation: coverage(effect, correlation, paired=True) for correlation in (0.0, 0.5, 0.8)}
    print(f"effect size {effect:g}: coverage by correlation within pairs {found}")
    assert all(0.92 <= share <= 0.98 for share in found.values()), found


@pytest.mark.parametrize("effect", [0.0, 3.0, 6.0])
def test_the_interval_of_unpaired_examples_covers_the_effect_size(effect: float) -> None:
    assert 0.92 <= coverage(effect, 0.0, paired=False) <= 0.98
