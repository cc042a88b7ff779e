"""`functional.linear` in float32 on a CPU, at the speed that the processor allows.

Where torch is built with MKL, that computes these products. On an AMD processor MKL leaves the widest instructions
unused; oneDNN, also part of torch, uses them. For one to four rows neither reaches the bandwidth of memory there: the
weight is split into pieces that one batched product multiplies. On an Intel processor MKL is the fastest for few rows
and small weights, and oneDNN for the others. Everything else (other processors, products with gradients, other
dtypes) is left to `functional.linear`. The choice depends on the processor and on shapes alone, so that a run gives
the same bits again. `make bench` measures it (workload `products`).
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

_AMD, _INTEL = "AMD", "Intel"
_VENDORS = {"AuthenticAMD": _AMD, "HygonGenuine": _AMD, "GenuineIntel": _INTEL}
# On an AMD processor:
_SMALL = 1 << 17  # numbers of a weight below which pieces cost more than they save
_LITTLE = 1 << 20  # multiplications below which starting oneDNN costs more than it saves
_FEW, _FEW_OF_WIDE = 4, 8  # the most rows for which pieces are faster
_PIECE = 512  # output features per piece of a weight as wide as the vocabulary
_WIDE = 16_384  # output features from which a weight counts as wide as a vocabulary
# On an Intel processor:
_LARGE, _SEVERAL = 1 << 22, 4  # numbers of a weight, and rows, from which oneDNN is faster


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`functional.linear` of `x`, `[..., in]`, and `weight`, `[out, in]`: `[..., out]`, equal up to rounding.

    If gradients are wanted, it is `functional.linear` itself.
    """
    n_rows = x.numel() // max(1, x.shape[-1])
    n_pieces, by_onednn = _n_pieces(weight, n_rows), _suits_onednn(weight, n_rows)
    if not n_rows or not (n_pieces or by_onednn) or not _is_plain(x, weight, bias):
        return functional.linear(x, weight, bias)
    rows = x.reshape(n_rows, -1)
    if n_pieces:
        product = _in_pieces(rows, weight, n_pieces)
        product = product if bias is None else product.add_(bias)
    else:
        product = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product.view(*x.shape[:-1], -1)


def linear_each(inputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """`linear` of several inputs `[rows, in]`, each with a weight of its own `[n, out, in]`: `[n, rows, out]`."""
    if inputs[0].shape[0] * weights[0].numel() < _LITTLE:  # multiplying takes less time than the calls
        return torch.bmm(torch.stack(list(inputs)).float(), weights.mT)
    return torch.stack([linear(each.float(), weight) for each, weight in zip(inputs, weights, strict=True)])


@cache
def _processor() -> str | None:
    """Whose processor it is, where torch computes products with MKL; `None` for other makers, and without MKL."""
    if not torch.backends.mkl.is_available():
        return None
    vendor = platform.processor()
    with suppress(OSError):  # Linux alone
        vendor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("flags")[0]
    return next((maker for name, maker in _VENDORS.items() if name in vendor), None)


def _suits_onednn(weight: Tensor, n_rows: int) -> bool:
    if _processor() == _AMD:
        return n_rows * weight.numel() >= _LITTLE and _has_onednn()
    return _processor() == _INTEL and n_rows >= _SEVERAL and weight.numel() >= _LARGE and _has_onednn()


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    wants_gradients = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    is_float32 = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return is_float32 and weight.is_contiguous() and not (wants_gradients and torch.is_grad_enabled())


def _n_pieces(weight: Tensor, n_rows: int) -> int:
    """The number of pieces to split a weight into for `n_rows` rows; 0 means not to split."""
    if _processor() != _AMD:
        return 0
    n_out, n_threads = len(weight), torch.get_num_threads()
    if weight.numel() < _SMALL or n_rows > (_FEW if n_out < _WIDE else _FEW_OF_WIDE):
        return 0
    if n_out < _WIDE:
        return max(2, n_threads) if n_out >= max(2, n_threads) else 0
    return n_out // _PIECE // n_threads * n_threads


def _in_pieces(x: Tensor, weight: Tensor, n_pieces: int) -> Tensor:
    """`x @ weight.T` over equal pieces of the weight; remaining rows of the weight are multiplied separately."""
    size = len(weight) // n_pieces
    n_covered = size * n_pieces
    pieces = weight[:n_covered].view(n_pieces, size, -1)
    found = torch.bmm(pieces, x.T.expand(n_pieces, -1, -1)).permute(2, 0, 1)
    product = found.reshape(len(x), n_covered).contiguous()
    if n_covered == len(weight):
        return product
    return torch.cat([product, functional.linear(x, weight[n_covered:])], dim=-1)
