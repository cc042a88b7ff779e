"""`functional.linear` for few rows in float32 on a CPU, at close to memory bandwidth.

MKL's product of one row with an `[out, in]` weight uses a fraction of the memory bandwidth, and that of two or three
rows is slower still; with a few more rows, it distributes the work unevenly over its threads. Splitting the weight into
pieces and computing one batched product avoids both (`make bench`, workload `products`). All other products use
`functional.linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# The most rows for which the weight is the left operand; the product is then transposed.
_LEFT, _LEFT_OF_WIDE = 4, 8
_FEW, _FEW_OF_WIDE = 32, 256  # the most rows for which pieces are faster
_PIECE = 512  # output features per piece of a weight as wide as the vocabulary


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`functional.linear` of `x`, `[..., in]`, and `weight`, `[out, in]`: `[..., out]`."""
    n_rows, n_pieces = x.numel() // max(1, x.shape[-1]), max(2, torch.get_num_threads())
    if not 0 < n_rows <= _FEW or len(weight) < n_pieces or not _can_be_split(x, weight):
        return functional.linear(x, weight, bias)
    product = _in_pieces(x.reshape(n_rows, -1), weight, n_pieces, left=n_rows <= _LEFT).view(*x.shape[:-1], -1)
    return product if bias is None else product.add_(bias)


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`functional.linear` of `x`, `[rows, in]`, and a weight as wide as the vocabulary, `[out, in]`: `[rows, out]`."""
    n_threads = torch.get_num_threads()
    n_pieces = len(weight) // _PIECE // n_threads * n_threads
    if n_pieces < 2 or not 0 < len(x) <= _FEW_OF_WIDE or not _can_be_split(x, weight):
        return functional.linear(x, weight)
    return _in_pieces(x, weight, n_pieces, left=len(x) <= _LEFT_OF_WIDE)


def _can_be_split(x: Tensor, weight: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and weight.is_contiguous()


def _in_pieces(x: Tensor, weight: Tensor, n_pieces: int, *, left: bool) -> Tensor:
    """`x @ weight.T` over equal pieces of the weight; remaining rows of the weight are multiplied separately."""
    size = len(weight) // n_pieces
    n_covered = size * n_pieces
    pieces = weight[:n_covered].view(n_pieces, size, -1)
    if left:
        found = torch.bmm(pieces, x.T.expand(n_pieces, -1, -1)).permute(2, 0, 1)
    else:
        found = torch.bmm(x.expand(n_pieces, -1, -1), pieces.transpose(1, 2)).transpose(0, 1)
    product = found.reshape(len(x), n_covered).contiguous()
    if n_covered == len(weight):
        return product
    return torch.cat([product, functional.linear(x, weight[n_covered:])], dim=-1)
