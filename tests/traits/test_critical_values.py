"""Levels that chance exceeds in at most 5 % of cases, from draws and from other prompts."""

from __future__ import annotations

import numpy as np
import pytest

from tlcapture.traits.statistics.critical_values import (
    REFERENCE_TOKENS,
    critical_score,
    critical_score_within,
    critical_value,
    widening,
)

DRAWS = 20_000


@pytest.mark.parametrize(("n", "largest"), [(19, 1), (20, 1), (39, 2), (199, 10), (200, 10), (1000, 50)])
def test_one_more_draw_exceeds_the_level_in_at_most_one_case_in_twenty(n: int, largest: int) -> None:
    values = np.random.default_rng(0).permutation(n)
    assert critical_value(values) == n - largest
    assert largest / (n + 1) <= 0.05  # the share of the n + 1 ranks that one more draw can have


def test_the_level_of_few_draws_is_the_largest_and_that_of_rows_is_taken_by_column() -> None:
    assert critical_value([3.0, 1.0]) == 3
    values = np.random.default_rng(0).standard_normal((200, 3))
    assert critical_value(values).tolist() == [critical_value(column) for column in values.T]


@pytest.mark.parametrize(("n_traits", "n_prompts"), [(1, 8), (10, 8), (10, 51)])
def test_the_largest_rise_of_one_more_prompt_exceeds_its_level_in_5_percent(n_traits: int, n_prompts: int) -> None:
    generator = np.random.default_rng(1)
    shape = (DRAWS // 10, n_traits)
    means = generator.standard_normal(shape) / np.sqrt(n_prompts)
    deviations = np.sqrt(generator.chisquare(n_prompts - 1, shape) / (n_prompts - 1))
    largest = ((generator.standard_normal(shape) - means) / deviations).max(axis=1)
    assert np.mean(largest > critical_score(n_traits, n_prompts)) == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize(("n_traits", "n_prompts"), [(1, 5), (10, 5), (10, 40)])
def test_the_largest_rise_of_a_prompt_of_a_set_exceeds_its_level_in_5_percent(n_traits: int, n_prompts: int) -> None:
    values = np.random.default_rng(2).standard_normal((DRAWS // n_prompts, n_traits, n_prompts))
    scores = (values - values.mean(axis=2, keepdims=True)) / values.std(axis=2, keepdims=True)
    level = critical_score_within(n_traits, n_prompts)
    assert level < np.sqrt(n_prompts - 1)  # no score is larger
    assert np.mean(scores.max(axis=1) > level) == pytest.approx(0.05, abs=0.01)


def test_a_rise_over_a_short_response_varies_more() -> None:
    generator = np.random.default_rng(3)
    topics, noise = generator.standard_normal(4000), 3 * generator.standard_normal((4000, REFERENCE_TOKENS))
    usual = (topics + noise.mean(axis=1)).std()
    short = (topics + noise[:, :5].mean(axis=1)).std()
    assert short / usual == pytest.approx(widening(usual, 3.0, 0.0, 30, 5), rel=0.05)
    assert widening(usual, 3.0, 0.0, 30, REFERENCE_TOKENS) == widening(usual, 3.0, 0.0, 30, 400) == 1


def test_the_rise_itself_makes_it_no_less_sure() -> None:
    trajectory = np.array([0.0, 1.0] * 10 + [20.0, 21.0] * 3)
    of_noise = np.array([0.0, 1.0] * 13).std()
    found = widening(1.0, trajectory.std(), 20.0, 20, 6)
    assert found == pytest.approx(widening(1.0, of_noise, 0.0, 20, 6))
