"""Products equal those in float64, whatever the processor; with gradients they are torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from tlcapture import products
from tlcapture.products import linear


def check_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, found: torch.Tensor) -> None:
    expected = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.shape == expected.shape
    assert found.dtype == x.dtype
    assert found.is_contiguous()
    tolerance = 1e-5 if x.dtype == torch.float32 else 0.05
    assert torch.allclose(found.double(), expected, atol=tolerance * float(expected.abs().max()), rtol=0)


@pytest.fixture(params=["AMD", "AMD without oneDNN", "Intel", None], autouse=True)
def _on_each_processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("_SMALL", "_LITTLE", "_LARGE"):
        monkeypatch.setattr(products, name, 0)
    monkeypatch.setattr(products, "_processor", lambda: request.param and request.param.split()[0])
    if request.param == "AMD without oneDNN":
        monkeypatch.setattr(products, "_has_onednn", lambda: False)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("shape", [(1,), (2,), (4,), (5,), (40,), (1, 1), (3, 1), (1, 4), (2, 3)])
def test_linear_equals_functional_linear(shape: tuple[int, ...]) -> None:
    for n_out, dtype in product([1, 2, 7, 48], [torch.float32, torch.bfloat16]):
        torch.manual_seed(0)
        x, weight, bias = (torch.randn(*size).to(dtype) for size in ((*shape, 24), (n_out, 24), (n_out,)))
        for b in (None, bias):
            check_product(x, weight, b, linear(x, weight, b))
            check_product(x, weight.T.contiguous().T, b, linear(x, weight.T.contiguous().T, b))
        transposed = x.transpose(0, -2) if x.ndim > 2 else x
        check_product(transposed, weight, None, linear(transposed, weight).contiguous())


@pytest.mark.parametrize("n_rows", [1, 3, 10, 200])
@pytest.mark.parametrize("n_out", [100, 1024, 1500])
def test_products_as_wide_as_a_vocabulary_equal_functional_linear(
    n_rows: int, n_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_WIDE", n_out)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(n_rows, 24), torch.randn(n_out, 24), torch.randn(n_out)
    check_product(x, weight, None, linear(x, weight))
    check_product(x, weight, bias, linear(x, weight, bias))


def test_empty_inputs_have_empty_products() -> None:
    assert linear(torch.empty(0, 24), torch.randn(20_000, 24)).shape == (0, 20_000)


def test_operands_and_bias_are_not_modified() -> None:
    for n_rows in (1, 5):
        x, weight, bias = torch.randn(n_rows, 8), torch.randn(6, 8), torch.randn(6)
        before = [each.clone() for each in (x, weight, bias)]
        linear(x, weight, bias)
        assert all(torch.equal(*pair) for pair in zip(before, (x, weight, bias), strict=True))


@pytest.mark.parametrize("n_rows", [1, 5])
def test_gradients_are_those_of_functional_linear(n_rows: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(n_rows, 8), torch.randn(6, 8), torch.randn(6)
    with torch.enable_grad():
        found, expected = (
            torch.autograd.grad(product(x, w, bias).square().sum(), w)[0]
            for product in (linear, functional.linear)
            for w in [weight.clone().requires_grad_()]
        )
    assert torch.equal(found, expected)


def test_small_weights_have_the_bits_of_functional_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x, weight = torch.randn(3, 64), torch.randn(96, 64)
    assert torch.equal(linear(x, weight), functional.linear(x, weight))


@pytest.mark.parametrize(
    ("cpuinfo", "maker"),
    [
        ("processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu", "Intel"),
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu", "AMD"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\n", None),
    ],
)
def test_the_maker_of_the_processor_decides(cpuinfo: str, maker: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(Path, "read_text", lambda *args, **how: cpuinfo)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products._processor.__wrapped__() == maker
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert products._processor.__wrapped__() is None


def test_few_rows_are_left_to_mkl_on_intel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(products, "_processor", lambda: "Intel")
    weight = torch.empty(1 << 12, 1 << 10)
    assert [products._n_pieces(weight, rows) for rows in (1, 4)] == [0, 0]
    suits = [products._suits_onednn(weight, rows) for rows in (1, 3, 4, 400)]
    assert suits == [False, False, products._has_onednn(), products._has_onednn()]
    assert not products._suits_onednn(weight[:-1], 400)
