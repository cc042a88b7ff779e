"""`functional.linear` in float32 on a CPU, at the speed that the processor allows.

torch computes these products with MKL, which leaves the widest instructions of an AMD processor unused; oneDNN, also
part of torch, uses them. For one to four rows neither reaches the bandwidth of memory: there, the weight is split into
pieces that one batched product multiplies (`make bench`, workload `products`). All other products, also those of small
weights and those with gradients, are computed by `functional.linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

_SMALL = 1 << 17  # numbers of a weight below which pieces cost more than they save
_LITTLE = 1 << 20  # multiplications below which starting oneDNN costs more than it saves
_FEW, _FEW_OF_WIDE = 4, 8  # the most rows for which pieces are faster
_PIECE = 512  # output features per piece of a weight as wide as the vocabulary
_WIDE = 16_384  # output features from which a weight counts as wide as a vocabulary


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`functional.linear` of `x`, `[..., in]`, and `weight`, `[out, in]`: `[..., out]`, equal up to rounding.

    If gradients are wanted, it is `functional.linear` itself.
    """
    n_rows = x.numel() // max(1, x.shape[-1])
    if not n_rows or not _is_plain(x, weight, bias):
        return functional.linear(x, weight, bias)
    rows = x.reshape(n_rows, -1)
    if n_pieces := _n_pieces(weight, n_rows):
        product = _in_pieces(rows, weight, n_pieces)
        product = product if bias is None else product.add_(bias)
    elif n_rows * weight.numel() >= _LITTLE and _has_onednn():
        product = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    else:
        return functional.linear(x, weight, bias)
    return product.view(*x.shape[:-1], -1)


def linear_each(inputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """`linear` of several inputs `[rows, in]`, each with a weight of its own `[n, out, in]`: `[n, rows, out]`."""
    if inputs[0].shape[0] * weights[0].numel() < _LITTLE:  # multiplying takes less time than the calls
        return torch.bmm(torch.stack(list(inputs)).float(), weights.mT)
    return torch.stack([linear(each.float(), weight) for each, weight in zip(inputs, weights, strict=True)])


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    wants_gradients = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    is_float32 = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return is_float32 and weight.is_contiguous() and not (wants_gradients and torch.is_grad_enabled())


def _n_pieces(weight: Tensor, n_rows: int) -> int:
    """The number of pieces to split a weight into for `n_rows` rows; 0 means not to split."""
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
