"""Figures of attention over all tokens and heads, and of a direction of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result

from tlcapture.errors import InputError
from tlcapture.explore.experiment import Experiment
from tlcapture.explore.saved_capture import SavedCapture

Run = Callable[..., Result]


@pytest.fixture
def cap(capture: Run, root: Path) -> SavedCapture:
    assert capture("--attention", "--no-project", "--limit", "1").exit_code == 0
    return Experiment("exp", root).captures["short"]["1"]


def test_a_matrix_is_of_a_head_or_of_the_mean_of_a_layer(cap: SavedCapture) -> None:
    patterns = cap.attention(1).patterns
    lower = np.tril_indices(len(cap.tokens))
    for head, expected in ((None, patterns.mean(0)), (1, patterns[1])):
        (heat,) = cap.plot.attention_matrix(1, head).data
        np.testing.assert_allclose(heat.z[lower], expected[lower], rtol=1e-6)
    assert "mean of all heads" in cap.plot.attention_matrix(-1).layout.title.text


def test_heads_are_averaged_over_the_response(cap: SavedCapture) -> None:
    (heat,) = cap.plot.attention_heads("previous").data
    n_prompt, n_tokens = len(cap.prompt.tokens), len(cap.tokens)
    for layer in range(cap.n_layers):
        patterns = cap.attention(layer).patterns
        expected = np.mean([patterns[:, q, q - 1] for q in range(n_prompt, n_tokens)], axis=0)
        np.testing.assert_allclose(heat.z[layer], expected, rtol=1e-5)
    with pytest.raises(InputError, match="choose one of entropy, distance, first, previous, self"):
        cap.plot.attention_heads("nix")


def test_heads_without_stored_attention_name_the_option(capture: Run, root: Path) -> None:
    assert capture("--no-project", "--limit", "1").exit_code == 0
    with pytest.raises(InputError, match="capture with --attention"):
        Experiment("exp", root).captures["short"]["1"].plot.attention_heads()


def test_a_trajectory_of_a_direction_of_ones_own_is_its_projection(cap: SavedCapture) -> None:
    direction = torch.randn(cap.d_model, generator=torch.Generator().manual_seed(0))
    (line, *_) = cap.plot.trajectory(direction, layer=-1).data
    expected = cap.residual(2).float() @ (direction / direction.norm())
    np.testing.assert_allclose(np.asarray(line.y)[1:], expected[1:].numpy(), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="pass layer=12"):
        cap.plot.trajectory(direction)
