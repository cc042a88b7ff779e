"""Products of few rows equal those in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from tlcapture.models.fast.products import linear, wide_linear


def check_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, found: torch.Tensor) -> None:
    expected = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.shape == expected.shape
    assert found.dtype == x.dtype
    assert found.is_contiguous()
    tolerance = 1e-5 if x.dtype == torch.float32 else 0.05
    assert torch.allclose(found.double(), expected, atol=tolerance * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (4,), (5,), (1, 1), (3, 1), (1, 4), (2, 3)])
@pytest.mark.parametrize("n_out", [1, 2, 7, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_equals_functional_linear(shape: tuple[int, ...], n_out: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*size).to(dtype) for size in ((*shape, 24), (n_out, 24), (n_out,)))
    for b in (None, bias):
        check_product(x, weight, b, linear(x, weight, b))
        check_product(x, weight.T.contiguous().T, b, linear(x, weight.T.contiguous().T, b))
    transposed = x.transpose(0, -2) if x.ndim > 2 else x
    check_product(transposed, weight, None, linear(transposed, weight).contiguous())


@pytest.mark.parametrize("n_rows", [1, 3, 10, 200, 300])
@pytest.mark.parametrize("n_out", [100, 1024, 1500])
def test_wide_linear_equals_functional_linear(n_rows: int, n_out: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(n_rows, 24), torch.randn(n_out, 24)
    check_product(x, weight, None, wide_linear(x, weight))


@pytest.mark.parametrize("multiply", [linear, wide_linear])
def test_empty_inputs_have_empty_products(multiply: Callable[..., torch.Tensor]) -> None:
    assert multiply(torch.empty(0, 24), torch.randn(2000, 24)).shape == (0, 2000)


def test_operands_and_bias_are_not_modified() -> None:
    x, weight, bias = torch.randn(1, 8), torch.randn(6, 8), torch.randn(6)
    before = [each.clone() for each in (x, weight, bias)]
    linear(x, weight, bias)
    assert all(torch.equal(*pair) for pair in zip(before, (x, weight, bias), strict=True))
