"""Paired intervals and tests, against SciPy's and in simulations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tlcapture.comparison.paired import LEVEL, _by_sign_flips, _p_of_mean, interval, paired_differences, smallest_p


def test_the_interval_of_symmetric_values_is_students() -> None:
    half = np.random.default_rng(0).exponential(size=6)
    values = 1 + np.concatenate([half, -half])
    expected = stats.t.interval(0.95, 11, loc=1, scale=stats.sem(values))
    assert interval(values) == pytest.approx(expected)
    (found,) = paired_differences(values[:, None])
    assert (found.low, found.high) == pytest.approx(expected)
    assert (found.n, found.mean) == (12, pytest.approx(1))


def test_the_interval_of_skewed_values_covers_their_mean_more_often_than_students() -> None:
    values = np.random.default_rng(1).chisquare(1, size=(400, 12))
    bounds = np.array([interval(each) for each in values])
    students = np.array(stats.t.interval(0.95, 11, loc=values.mean(axis=1), scale=stats.sem(values, axis=1))).T
    ours, theirs = (np.mean((each[:, 0] <= 1) & (each[:, 1] >= 1)) for each in (bounds, students))
    assert theirs < 0.9 < 0.92 < ours
    assert (bounds[:, 1] - values.mean(axis=1) > values.mean(axis=1) - bounds[:, 0]).mean() > 0.95  # towards the tail


def test_intervals_of_several_means_are_wider_and_no_change_that_stands_out_has_0_in_its_own() -> None:
    generator = np.random.default_rng(6)
    for draw in (generator.standard_normal, generator.standard_exponential):
        values = draw((9, 3)) + np.array([0.0, 1.5, -3.0])
        assert interval(values[:, 0], 3)[0] < interval(values[:, 0])[0]
        for found, column in zip(paired_differences(values), values.T, strict=True):
            assert (found.low, found.high) == pytest.approx(interval(column, 3))
            assert not (found.stands_out and found.low <= 0 <= found.high)
            assert {type(each) for each in (found.mean, found.low, found.high, found.p)} == {float}  # as orjson needs


@pytest.mark.parametrize("n", [3, 8, 11])
def test_the_p_of_one_trait_by_sign_flips_is_that_of_scipys_exact_ones(n: int) -> None:
    values = np.random.default_rng(n).normal(0.4, 1.0, size=(n, 1))
    expected = stats.permutation_test(
        (values[:, 0],), lambda each, axis: np.abs(each.mean(axis=axis)), permutation_type="samples",
        alternative="greater", vectorized=True,
    )  # fmt: skip
    assert _by_sign_flips(values) == pytest.approx(expected.pvalue)
    assert paired_differences(values)[0].p == max(_by_sign_flips(values)[0], _p_of_mean(values[:, 0]))


def test_traits_that_no_side_favours_stand_out_in_at_most_a_twentieth_of_runs() -> None:
    generator, n_runs = np.random.default_rng(1), 300
    for n_prompts in (8, 12):
        shared = generator.normal(size=(n_runs, n_prompts, 1))
        values = 0.6 * shared + generator.standard_t(4, size=(n_runs, n_prompts, 10))
        runs = [any(each.stands_out for each in paired_differences(run)) for run in values]
        assert np.mean(runs) <= LEVEL + 2.6 * np.sqrt(LEVEL * (1 - LEVEL) / n_runs)


def test_skewed_differences_of_mean_0_seldom_stand_out() -> None:
    """They are not exchangeable: by sign flips alone, one of ten traits changes in half of these runs."""
    runs = np.random.default_rng(3).chisquare(1, size=(50, 12, 10)) - 1
    assert np.mean([_by_sign_flips(run).min() <= LEVEL for run in runs]) > 0.3
    assert np.mean([any(each.stands_out for each in paired_differences(run)) for run in runs]) < 0.2


def test_a_set_with_a_prompt_that_changes_the_other_way_by_much_does_not_stand_out() -> None:
    """Of eight prompts like the others alone, all change the same way, which is a finding about such prompts."""
    values = -1 + 0.5 * np.random.default_rng(9).standard_normal((50, 8, 1))
    assert np.mean([paired_differences(each)[0].stands_out for each in values]) > 0.9
    values[:, 3] = 9
    assert not any(paired_differences(each)[0].stands_out for each in values)


def test_a_clear_change_stands_out_among_traits_that_do_not_change() -> None:
    generator = np.random.default_rng(2)
    values = generator.normal(size=(12, 10))
    values[:, 3] += 3
    found = paired_differences(values)
    assert [number for number, each in enumerate(found) if each.stands_out] == [3]


def test_a_change_that_random_directions_share_does_not_stand_out() -> None:
    """Under another model every prompt moves alike, onto any direction."""
    generator = np.random.default_rng(7)
    values = generator.normal([2.0, 20.0], 0.1, size=(9, 2))
    random = [2 * generator.standard_normal(200), 2 * generator.standard_normal(200)]
    assert [each.stands_out for each in paired_differences(values)] == [True, True]
    shared, own = paired_differences(values, random)
    assert (shared.stands_out, own.stands_out) == (False, True)
    assert (shared.p, own.p_random) == (shared.p_random, pytest.approx(1 / 201))
    assert paired_differences(values, [None, random[1]])[0].p_random is None
    assert paired_differences(np.zeros((9, 1)), [np.zeros(200)])[0].p == 1


def test_the_largest_of_several_traits_like_random_directions_stands_out_in_at_most_a_twentieth_of_runs() -> None:
    generator, n_runs = np.random.default_rng(8), 400
    scales, found = np.array([0.1, 1.0, 50.0]), 0
    for _ in range(n_runs):
        drawn = generator.standard_t(4, size=(201, 3)) * scales
        differences = drawn[0] + 1e-3 * scales * generator.standard_normal((8, 3))
        found += any(each.p_random <= LEVEL for each in paired_differences(differences, [*drawn[1:].T]))
    assert found / n_runs <= LEVEL + 2.6 * np.sqrt(LEVEL * (1 - LEVEL) / n_runs)


def test_few_prompts_let_nothing_stand_out() -> None:
    assert not any(each.stands_out for each in paired_differences(np.full((5, 1), 9.0)))
    assert paired_differences(np.full((5, 1), 9.0))[0].p == smallest_p(5) == 0.0625
    assert paired_differences(np.full((6, 1), 9.0))[0].stands_out
    (one,) = paired_differences(np.array([[9.0]]))
    assert (one.low, one.p) == (None, 1.0)


def test_no_change_at_all_is_within_chance() -> None:
    (found,) = paired_differences(np.zeros((10, 1)))
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_a_prompt_without_a_value_is_left_out() -> None:
    values = np.array([[1.0, 2.0], [np.nan, 3.0], [3.0, 4.0]])
    found = paired_differences(values)
    assert [(each.n, each.mean) for each in found] == [(2, 2.0), (3, 3.0)]
    assert paired_differences(np.full((3, 1), np.nan))[0].p is None


def test_a_column_of_rounding_does_not_change_the_p_of_others() -> None:
    values = np.random.default_rng(5).normal(1, 1, size=(10, 1))
    alone, beside = paired_differences(values)[0], paired_differences(np.hstack([values, np.zeros((10, 3))]))[0]
    assert alone == beside
