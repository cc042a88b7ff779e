"""Means and dynamics within spans, next to closed forms and to the dynamics of the whole response."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tlcapture.prompts.spans import TokenSpan, unfound
from tlcapture.traits.statistics.dynamics import dynamics
from tlcapture.traits.statistics.span_dynamics import by_span


def span(kind: str, role: str | None, start: int, stop: int) -> TokenSpan:
    return TokenSpan.model_validate({"kind": kind, "role": role, "start": start, "stop": stop})


SPANS = [
    span("turn", "system", 0, 3),
    span("template", None, 3, 5),
    span("turn", "user", 5, 9),
    unfound("tool", "it has no text"),
    span("thinking", "assistant", 9, 29),
    span("template", None, 29, 31),
    span("answer", "assistant", 31, 51),
]


def test_means_and_velocities_of_spans_leave_out_the_first_token() -> None:
    values = np.arange(51.0) ** 2
    values[0] = 1e6
    (found,) = by_span(values[None], SPANS)
    assert [(each["kind"], each["role"], each["start"], each["stop"]) for each in found] == [
        ("turn", "system", 0, 3),
        ("turn", "user", 5, 9),
        ("thinking", "assistant", 9, 29),
        ("answer", "assistant", 31, 51),
    ]
    assert [each["mean"] for each in found] == pytest.approx(
        [(1 + 4) / 2, (25 + 36 + 49 + 64) / 4, np.mean(values[9:29]), np.mean(values[31:])], rel=1e-5
    )
    assert [each["peak_velocity"] for each in found] == [3, 15, 28**2 - 27**2, 50**2 - 49**2]
    assert [("commitment_point" in each) for each in found] == [False, False, True, True]


def test_each_of_several_trajectories_has_what_it_has_alone() -> None:
    values = np.random.default_rng(2).normal(0, 1e3, (9, 51)) * 10.0 ** np.arange(-4, 5)[:, None]
    assert by_span(values, SPANS) == [by_span(row[None], SPANS)[0] for row in values]


def test_thinking_and_answer_commit_where_each_steps() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, (2, 51))
    noise[0, 17:29] += 5  # within thinking
    noise[1, 40:] -= 5  # within the answer
    one, other = by_span(noise, SPANS)
    points = [[each["commitment_point"] for each in found[2:]] for found in (one, other)]
    assert (points[0][0], points[1][1]) == (17, 40)
    assert one[2]["commitment_shift"] == pytest.approx(5, abs=0.2)
    assert other[3]["commitment_shift"] == pytest.approx(-5, abs=0.2)
    assert one[2]["commitment_p"] <= 0.05


def test_an_answer_that_is_the_whole_response_has_the_dynamics_of_the_response() -> None:
    values = np.random.default_rng(1).normal(0, 1, 40)
    values[25:] += 6
    whole = dynamics(torch.from_numpy(values), 10).to_json()
    (found,) = by_span(values[None], [span("turn", "user", 0, 10), span("answer", "assistant", 10, 40)])
    for name in ("commitment_point", "commitment_shift", "commitment_p", "peak_velocity"):
        assert found[1][name] == pytest.approx(whole[name], rel=1e-4)


def test_what_needs_a_token_without_a_score_and_what_is_too_short_is_null() -> None:
    values = np.arange(51.0)
    values[12] = np.nan
    (found,) = by_span(values[None], [*SPANS[:5], span("answer", "assistant", 29, 34)])
    thinking, answer = found[2:]
    assert [thinking[name] for name in ("mean", "peak_velocity", "commitment_point", "commitment_p")] == [None] * 4
    assert (answer["mean"], answer["commitment_point"], answer["commitment_p"]) == (31, None, None)
    (sink,) = by_span(values[None], [span("turn", "user", 0, 1)])[0]
    assert (sink["mean"], sink["peak_velocity"]) == (None, 0)
