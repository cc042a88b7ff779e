"""Linear modules of a bridge compute as `nn.Linear` does."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from tests import tiny
from tests.test_parity import relative
from tlcapture import products
from tlcapture.models.fast.linear_modules import FastLinear, make_linears_fast


@pytest.mark.parametrize("shape", [(1, 12), (3, 1, 12), (2, 5, 12), (40, 1, 12), (0, 3, 12), (12,)])
def test_outputs_are_those_of_linear(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_SMALL", 0)
    monkeypatch.setattr(products, "_processor", lambda: "AMD")
    monkeypatch.setattr(products, "_LITTLE", 0)
    for wide, bias, dtype in product([4, 10_000], [True, False], [torch.float32, torch.bfloat16]):
        monkeypatch.setattr(products, "_WIDE", wide)
        generator = torch.Generator().manual_seed(0)
        plain = nn.Linear(12, 1030, bias=bias, dtype=dtype)
        x = torch.randn(shape, generator=generator).to(dtype)
        with torch.no_grad():
            expected = plain(x)
            make_linears_fast(plain)
            found = plain(x)
        assert type(plain) is FastLinear
        assert found.shape == expected.shape and found.dtype == expected.dtype
        if x.numel():
            assert relative(found, expected) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_gradients_and_subclasses_are_left_as_they_are() -> None:
    class Own(nn.Linear):
        pass

    module = nn.Sequential(nn.Linear(4, 8), Own(8, 4))
    x = torch.randn(2, 4, requires_grad=True)
    expected = module(x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    make_linears_fast(module)
    assert [type(each) for each in module] == [FastLinear, Own]
    assert torch.equal(module(x), expected)
    assert torch.equal(torch.autograd.grad(module(x).sum(), x)[0], gradient)


def test_the_linear_modules_of_a_bridge_are_fast() -> None:
    modules = list(tiny.model("llama", "bridge").tl.original_model.modules())
    assert any(type(each) is FastLinear for each in modules)
    assert not any(type(each) is nn.Linear for each in modules)
