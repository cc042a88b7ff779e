"""Dynamics against closed forms and properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tlcapture.errors import NumericalError
from tlcapture.traits.dynamics import dynamics

lines = st.lists(st.floats(-100, 100), min_size=1, max_size=40)


def of(values: list[float], n_prompt: int = 0):
    return dynamics(torch.tensor(values, dtype=torch.float64), n_prompt)


def test_velocity_and_acceleration_are_first_and_second_differences() -> None:
    found = of([0.0, 1.0, 4.0, 2.0])
    assert found.velocity.tolist() == [1.0, 3.0, -2.0]
    assert found.acceleration.tolist() == [2.0, -5.0]
    assert found.peak_velocity == 3.0


def test_a_step_commits_at_its_token_counted_over_the_whole_sequence() -> None:
    assert of([9.0] * 5 + [0.0] * 6 + [1.0] * 10, n_prompt=5).commitment_point == 5 + 6


def test_a_trajectory_that_leaves_its_band_again_commits_after_that() -> None:
    response = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert of(response).commitment_point == 4


def test_a_constant_response_is_committed_from_its_first_token() -> None:
    assert of([5.0, 2.0, 2.0, 2.0, 2.0], n_prompt=1).commitment_point == 1


@pytest.mark.parametrize("height", [0.1, 0.7, -1.1, 1e-30])
def test_equal_numbers_are_constant_however_their_mean_is_rounded(height: float) -> None:
    for length in range(4, 40):
        assert dynamics(torch.full((2 + length,), height, dtype=torch.float64), 2).commitment_point == 2


def test_a_response_that_never_settles_has_no_commitment_point() -> None:
    assert of([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]).commitment_point is None


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_fewer_than_four_response_tokens_cannot_commit(length: int) -> None:
    assert of([1.0, 2.0] + [1.0] * length, n_prompt=2).commitment_point is None


def test_persistence_counts_tokens_that_stay_at_or_above_half_the_peak() -> None:
    assert of([1.0, 10.0, 7.0, 5.0, 4.9, 9.0]).persistence == 2
    assert of([1.0, -10.0, -7.0, 5.0, 8.0]).persistence == 3
    assert of([10.0, 1.0]).persistence == 0


def test_the_first_tokens_attention_sink_is_not_a_peak() -> None:
    found = of([1800.0, 1.0, 4.0, 8.0, 5.0, 3.0], n_prompt=2)
    assert found.peak_velocity == 4.0
    assert found.persistence == 1
    assert found.velocity[0] == -1799.0


def test_a_single_token_has_no_motion() -> None:
    found = of([3.0])
    assert (found.peak_velocity, found.persistence, len(found.velocity)) == (0.0, 0, 0)


@given(lines, st.floats(0.1, 10))
def test_scaling_a_trajectory_scales_velocity_and_moves_no_commitment_point(values: list[float], factor: float) -> None:
    plain, scaled = of(values), of([factor * value for value in values])
    assert torch.allclose(scaled.velocity, factor * plain.velocity, atol=1e-9)
    if max(values) - min(values) > 1e-3:
        negated = of([-value for value in values])
        assert negated.commitment_point == plain.commitment_point
        assert negated.persistence == plain.persistence


@given(lines)
def test_from_the_commitment_point_on_the_response_stays_in_its_band(values: list[float]) -> None:
    found = of(values)
    if found.commitment_point is not None:
        final = sum(values[-(len(values) // 4) :]) / (len(values) // 4)
        band = (max(values) - min(values)) / 4
        assert all(abs(value - final) <= band + 1e-9 for value in values[found.commitment_point :])
        if found.commitment_point > 0:
            assert abs(values[found.commitment_point - 1] - final) > band - 1e-9


def test_nan_is_an_error() -> None:
    with pytest.raises(NumericalError, match="NaN or inf"):
        of([1.0, float("nan")])
