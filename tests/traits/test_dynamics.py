"""Dynamics against closed forms, properties, and the rates at which chance gives findings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tlcapture.errors import NumericalError
from tlcapture.traits.statistics.change_points import _clarities, _fitted, autoregressive, change_points
from tlcapture.traits.statistics.critical_values import LEVEL
from tlcapture.traits.statistics.dynamics import Motion, Strengths, dynamics
from tlcapture.traits.statistics.rises import BLOCK, SMOOTHED, _permuted, peak_of, rises, smoothed
from tlcapture.views.kept_tokens import Positions

TRIALS = 4000
N_PROMPT = 40
COEFFICIENTS = {"white noise": 0.0, "AR(0.5)": 0.5, "AR(0.8)": 0.8}
MOST_FALSE = {"white noise": 0.07, "AR(0.5)": 0.10, "AR(0.8)": 0.17}

lines = st.lists(st.floats(-100, 100), min_size=1, max_size=40)
Series = NDArray[np.float64]


def of(values: list[float], n_prompt: int = 0):
    return dynamics(torch.tensor(values, dtype=torch.float64), n_prompt)


def steps(height: float, n_tokens: int) -> tuple[Series, NDArray[np.int64]]:
    """White noise of variance 1 with a step, at least three tokens from the ends, and the first token after it."""
    generator = np.random.default_rng([7, n_tokens, int(height)])
    at = generator.integers(3, n_tokens - 2, TRIALS)
    return generator.standard_normal((TRIALS, n_tokens)) + height * (np.arange(n_tokens) >= at[:, None]), at


def committed(series: Series) -> NDArray[np.int64]:
    """The commitment point of each response without a prompt before it, -1 for none."""
    found = change_points(series)
    return np.where(found.p <= LEVEL, found.index, -1)


@pytest.mark.parametrize("n_tokens", [50, 20])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_chance_seldom_commits_or_persists(name: str, n_tokens: int) -> None:
    generator = np.random.default_rng([3, n_tokens])
    series = autoregressive(COEFFICIENTS[name], (TRIALS, N_PROMPT + n_tokens), generator)
    motion = Motion.of(torch.from_numpy(series), N_PROMPT)
    changed = (committed(series[:, N_PROMPT:]) != committed(series[:, N_PROMPT:-1])).mean()
    print(
        f"\n{n_tokens} tokens, {name}: {motion.commits.mean():.1%} commit, {motion.persists.mean():.1%} persist; "
        f"without the last token {changed:.1%} commit elsewhere"
    )
    assert motion.commits.mean() <= MOST_FALSE[name]
    assert motion.persists.mean() <= MOST_FALSE[name]


@pytest.mark.parametrize("n_tokens", [50, 20])
@pytest.mark.parametrize("height", [2.0, 3.0, 5.0])
def test_a_step_is_found_where_it_is(height: float, n_tokens: int) -> None:
    series, at = steps(height, n_tokens)
    found = committed(series)
    exact, near = (found == at).mean(), ((found >= 0) & (np.abs(found - at) <= 1)).mean()
    changed = (found != committed(series[:, :-1])).mean()
    print(
        f"\n{n_tokens} tokens, step of {height:.0f} sd: exact {exact:.1%}, within one token {near:.1%}, "
        f"found {(found >= 0).mean():.1%}; changed without the last token {changed:.1%}"
    )
    if n_tokens == 50 and height >= 3:
        assert (exact, near) >= (0.8, 0.9)
        assert near >= 0.9
        assert changed <= 0.1


@pytest.mark.parametrize("n_prompt", [5, 15, 100])
def test_chance_seldom_persists_whatever_the_length_of_the_prompt(n_prompt: int) -> None:
    for name, coefficient in COEFFICIENTS.items():
        series = autoregressive(coefficient, (1000, n_prompt + 50), np.random.default_rng([5, n_prompt]))
        assert rises(series, n_prompt).is_beyond_chance.mean() <= MOST_FALSE[name] + 0.02


@pytest.mark.parametrize(("n_prompt", "n_response"), [(40, 50), (3, 5), (2, 1), (5, 8), (100, 7), (3, 40)])
def test_permuted_rises_are_those_of_dealt_blocks(n_prompt: int, n_response: int) -> None:
    """Against a slow computation of each permutation on its own."""
    rest = np.random.default_rng(0).standard_normal((3, n_prompt + n_response))[:, 1:]
    n_tokens, n_permutations = rest.shape[1], 20
    rises_of, *found = _permuted(rest.T, n_response, n_permutations)
    response = smoothed(rest[:, n_tokens - n_response :])
    assert np.allclose(rises_of, response.max(axis=1) - rest[:, : n_tokens - n_response].mean(axis=1))
    generator = np.random.default_rng([n_tokens, n_response])
    blocks = np.array_split(np.arange(n_tokens), -(-n_tokens // BLOCK))
    on_ring = np.mean([np.roll(rest, shift, axis=1) for shift in range(-2, 3)], axis=0)
    for permutation in range(n_permutations):
        order = np.concatenate([blocks[each] for each in generator.permutation(len(blocks))])
        response = (order[-n_response:] + generator.integers(n_tokens)) % n_tokens
        prompt = np.setdiff1d(np.arange(n_tokens), response)
        line = smoothed(rest[:, response])
        line[:, 2 : n_response - 2] = on_ring[:, response[2 : n_response - 2]]
        assert np.allclose(found[permutation], line.max(axis=1) - rest[:, prompt].mean(axis=1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n_prompt", "n_tokens"), [(40, 90), (40, 45), (1, 30), (0, 12), (20, 20)])
def test_random_directions_commit_and_persist_as_their_motion_says(n_prompt: int, n_tokens: int, dtype: type) -> None:
    series = autoregressive(0.6, (400, n_tokens), np.random.default_rng(6)).astype(dtype)
    series[:4] = 0.25
    series[4:100, n_tokens - 9 :] += 4
    motion = Motion.of(torch.from_numpy(series), n_prompt, n_permutations=19)
    found = Strengths.of(series, n_prompt, Positions.of(None, n_prompt, n_tokens), 19)
    assert np.array_equal(found.commits, motion.commits)
    assert np.array_equal(found.persists, motion.persists)
    for strengths, known in ((found.changes, motion.changes), (found.rises, motion.rises)):
        assert (strengths is None) == (known is None)
        tolerance = 1e-3 if dtype is np.float32 else 1e-8
        assert known is None or np.allclose(strengths, known.strength, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_tokens", [8, 9, 50, 300])
def test_many_clarities_are_those_of_residuals(n_tokens: int, dtype: type) -> None:
    """Also of series that are constant, that have a step without noise, and that lie far from 0."""
    series = np.random.default_rng(7).standard_normal((n_tokens, 300)).astype(dtype)
    series[:, :50] = series[:, :50].cumsum(axis=0)
    series[n_tokens // 2 :, 50:100] += 4
    series[n_tokens // 2 :, 100:150] += 1000
    series[:, 150:200] += 1000
    series[:, 200:] = 7.3
    series[n_tokens // 2 :, 250:] = 9.1
    (_, _, *known), found = _fitted(series), _clarities(series)
    for one, other in zip(known, found, strict=True):
        tolerance = 1e-3 if dtype is np.float32 else 1e-9
        assert np.allclose(other, one, rtol=tolerance, atol=tolerance)


def test_a_sustained_rise_persists() -> None:
    series = np.random.default_rng(4).standard_normal((500, 110))
    series[:, 70:] += 2
    found = rises(series, 60)
    assert found.is_beyond_chance.mean() > 0.8
    assert (found.peak >= 8).all()


def test_velocity_and_acceleration_are_first_and_second_differences() -> None:
    found = of([0.0, 1.0, 4.0, 2.0])
    assert found.velocity.tolist() == [1.0, 3.0, -2.0]
    assert found.acceleration.tolist() == [2.0, -5.0]


def test_the_peak_velocity_is_that_of_a_step_into_or_within_the_response() -> None:
    assert of([0.0, 9.0, 0.0, 3.0, 4.0], n_prompt=3).peak_velocity == 3.0
    assert of([1800.0, 1.0, 4.0, 8.0, 5.0, 3.0], n_prompt=2).peak_velocity == 4.0
    assert of([0.0, 9.0], n_prompt=2).peak_velocity == 0.0


def test_a_step_commits_at_its_token_counted_over_the_whole_sequence() -> None:
    found = of([9.0] * 5 + [0.0] * 6 + [1.0] * 10, n_prompt=5)
    assert found.commitment_point == 5 + 6
    assert found.commitment_shift == pytest.approx(1.0)
    assert found.commitment_p is not None
    assert found.commitment_p < 0.01


def test_a_fall_commits_with_a_negative_shift() -> None:
    assert of([1.0] * 6 + [-2.0] * 8).commitment_shift == pytest.approx(-3.0)


@given(st.lists(st.floats(-100, 100), min_size=8, max_size=40), st.integers(0, 3))
def test_the_change_point_has_the_smallest_squared_error_of_all_splits(values: list[float], n_digits: int) -> None:
    series = np.round(values, n_digits)
    found = int(change_points(series[None]).index[0])
    errors = {k: series[:k].var() * k + series[k:].var() * (len(series) - k) for k in range(3, len(series) - 2)}
    assert errors[found] == pytest.approx(min(errors.values()), abs=1e-6)


@pytest.mark.parametrize("height", [0.1, 0.7, -1.1, 3.3, 1e-30])
def test_equal_numbers_neither_commit_nor_persist(height: float) -> None:
    for length in (*range(1, 40), 5000):
        found = dynamics(torch.full((2 + length,), height, dtype=torch.float64), 2)
        assert (found.commitment_point, found.persistence) == (None, None)
        assert found.commitment_shift in (None, 0.0)


@pytest.mark.parametrize("length", range(8))
def test_fewer_than_eight_response_tokens_cannot_commit(length: int) -> None:
    found = of([1.0, 2.0] + [1.0] * (length // 2) + [9.0] * (length - length // 2), n_prompt=2)
    assert (found.commitment_point, found.commitment_shift, found.commitment_p) == (None, None, None)


def test_a_long_response_commits_at_its_step() -> None:
    values = np.random.default_rng(0).standard_normal(3000)
    values[1800:] += 3
    found = dynamics(torch.from_numpy(values), 10)
    assert found.commitment_point == pytest.approx(1800, abs=1)


def test_persistence_counts_the_peak_and_what_stays_above_half_of_its_rise() -> None:
    prompt, response = [50.0] + [2.0, -2.0] * 20, [10.0] * 20 + [0.0] * 4
    found = of(prompt + response, n_prompt=len(prompt))
    line = smoothed(np.array(response))
    assert peak_of(np.array(prompt + response), len(prompt)) == len(prompt)
    assert found.persistence == int((line >= 5.0).sum()) == 20


def test_smoothing_repeats_the_edges() -> None:
    values = np.random.default_rng(1).standard_normal(12)
    padded = [values[0]] * 2 + list(values) + [values[-1]] * 2
    expected = [np.mean(padded[start : start + SMOOTHED]) for start in range(12)]
    assert np.allclose(smoothed(values), expected)


def test_a_trait_below_zero_rises_as_one_above() -> None:
    series = np.random.default_rng(4).standard_normal(90)
    series[50:] += 4
    above, below = (dynamics(torch.from_numpy(series + offset), 40) for offset in (100.0, -100.0))
    assert above.persistence == below.persistence is not None
    assert dynamics(torch.from_numpy(-series), 40).persistence is None


def test_the_first_tokens_attention_sink_changes_no_statistic() -> None:
    series = np.random.default_rng(6).standard_normal(80)
    series[50:] += 3
    sink = series.copy()
    sink[0] = 1e5
    one, other = (dynamics(torch.from_numpy(each), 30) for each in (series, sink))
    names = ("commitment_point", "commitment_shift", "commitment_p", "persistence", "peak_velocity")
    assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]
    assert one.persistence is not None


@pytest.mark.parametrize("n_prompt", [0, 1])
def test_without_a_baseline_nothing_persists(n_prompt: int) -> None:
    assert of([0.0] * 20 + [9.0] * 20, n_prompt=n_prompt).persistence is None


def test_a_single_token_has_no_motion() -> None:
    found = of([3.0])
    assert (found.peak_velocity, found.persistence, len(found.velocity)) == (0.0, None, 0)


@given(lines, st.floats(0.1, 10), st.integers(0, 5))
def test_scaling_a_trajectory_moves_no_commitment_point(values: list[float], factor: float, n_prompt: int) -> None:
    values = [round(value, 3) for value in values]
    plain, scaled = of(values, n_prompt), of([factor * value for value in values], n_prompt)
    assert torch.allclose(scaled.velocity, factor * plain.velocity, atol=1e-9)
    if plain.commitment_p is not None and scaled.commitment_p is not None:
        assert scaled.commitment_p == pytest.approx(plain.commitment_p, abs=0.01)


def test_the_same_trajectory_always_has_the_same_dynamics_whatever_is_measured_beside_it() -> None:
    series = np.random.default_rng(8).standard_normal((6, 70)).cumsum(axis=1)
    together = Motion.of(torch.from_numpy(series), 20).dynamics()
    for row, found in enumerate(together):
        alone = dynamics(torch.from_numpy(series[row]), 20)
        assert found.commitment_p == pytest.approx(alone.commitment_p, rel=1e-9)
        for name in ("commitment_point", "persistence", "peak_velocity"):
            assert getattr(found, name) == getattr(alone, name)


def test_nan_is_an_error() -> None:
    with pytest.raises(NumericalError, match="NaN or inf"):
        of([1.0, float("nan")])


@pytest.mark.parametrize("n_prompt", range(4))
def test_changes_need_eight_tokens_of_the_response_and_rises_a_baseline_and_every_token(n_prompt: int) -> None:
    """The first token of a sequence counts for neither."""
    for n_response in range(max(0, 1 - n_prompt), 11):
        n_tokens, first = n_prompt + n_response, max(1, n_prompt)
        for missing in (None, *range(n_tokens)):
            values = torch.arange(float(n_tokens), dtype=torch.float64)[None].sin()
            values[:, [] if missing is None else [missing]] = torch.nan
            held = Positions(tuple(each for each in range(n_tokens) if each != missing), n_prompt, n_tokens)
            motion = Motion.of(values, n_prompt, held, n_permutations=1)
            has_changes = n_tokens - first >= 8 and (missing is None or missing < first)
            has_rises = n_prompt >= 2 and n_response > 0 and missing in (None, 0)
            assert (motion.changes is not None, motion.rises is not None) == (has_changes, has_rises)
