"""Massive dimensions in activations that have known ones."""

from __future__ import annotations

import pytest
import torch

from tlcapture.traits.massive_dimensions import massive_dimensions, massive_share, norm_share


def activations() -> torch.Tensor:
    """Fifty tokens of 64 dimensions of variance 1, except 7 and 20, 30 and 15 times as large; a huge first token."""
    values = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    values[:, 7] *= 30
    values[:, 20] *= 15
    values[0] *= 1e4
    return values


def test_massive_dimensions_are_named_largest_first() -> None:
    assert massive_dimensions(activations()) == (7, 20)
    assert massive_dimensions(torch.ones(1, 4)) == ()
    assert massive_dimensions(torch.zeros(5, 4)) == ()


def test_their_share_of_the_squared_norm() -> None:
    values = activations()
    squares = values[1:].double().square()
    assert norm_share(values, (7, 20)) == pytest.approx(float(squares[:, [7, 20]].sum() / squares.sum()))
    assert norm_share(values, ()) == 0


def test_shares_of_a_projections_variance_add_up_to_1() -> None:
    values, direction = activations(), torch.randn(64, generator=torch.Generator().manual_seed(1))
    dimensions, massive = massive_share(values, direction)
    rest = direction.clone()
    rest[list(dimensions)] = 0
    whole, without = (values[1:].double() @ each.double() for each in (direction, rest))
    of_rest = torch.cov(torch.stack([without, whole]))[0, 1] / whole.var()
    assert massive + float(of_rest) == pytest.approx(1)
    assert massive > 0.9


def test_a_direction_without_massive_dimensions_takes_nothing_from_them() -> None:
    direction = torch.ones(64)
    direction[[7, 20]] = 0
    assert massive_share(activations(), direction)[1] == 0


@pytest.mark.parametrize("values", [torch.ones(1, 4), torch.ones(6, 4), torch.eye(5, 4)[1:2].expand(3, 4)])
def test_a_projection_that_does_not_vary_has_a_share_of_0(values: torch.Tensor) -> None:
    assert massive_share(values, torch.ones(4))[1] == 0
