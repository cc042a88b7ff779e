"""`functional.linear` for few rows, on a CPU in float32, at nearly the speed of memory.

With one row, MKL's product with an `[out, in]` weight reads memory far slower than the machine can, and with two
or three it takes longer still; with a few more, its threads share the work badly. The same product over a weight cut
into pieces, as one batched product, does neither (`make bench`, part `products`). Everything else goes to
`functional.linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Up to so many rows the weight is the left operand, whose product lies row by weight and is turned over.
_LEFT, _LEFT_OF_WIDE = 4, 8
_FEW, _FEW_OF_WIDE = 32, 256  # up to so many rows the pieces win
_PIECE = 512  # rows of a piece of a weight as wide as the vocabulary


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`functional.linear`: `x` is `[..., in]`, `weight` `[out, in]`, the result `[..., out]`."""
    n_rows, n_pieces = x.numel() // max(1, x.shape[-1]), max(2, torch.get_num_threads())
    if not 0 < n_rows <= _FEW or len(weight) < n_pieces or not _can_be_cut(x, weight):
        return functional.linear(x, weight, bias)
    product = _in_pieces(x.reshape(n_rows, -1), weight, n_pieces, left=n_rows <= _LEFT).view(*x.shape[:-1], -1)
    return product if bias is None else product.add_(bias)


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The same for `[rows, in]` and a weight that is as wide as the vocabulary."""
    n_threads = torch.get_num_threads()
    n_pieces = len(weight) // _PIECE // n_threads * n_threads
    if n_pieces < 2 or not 0 < len(x) <= _FEW_OF_WIDE or not _can_be_cut(x, weight):
        return functional.linear(x, weight)
    return _in_pieces(x, weight, n_pieces, left=len(x) <= _LEFT_OF_WIDE)


def _can_be_cut(x: Tensor, weight: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and weight.is_contiguous()


def _in_pieces(x: Tensor, weight: Tensor, n_pieces: int, *, left: bool) -> Tensor:
    """`x @ weight.T`; rows of the weight that the pieces leave over are multiplied by themselves."""
    size = len(weight) // n_pieces
    cut = size * n_pieces
    pieces = weight[:cut].view(n_pieces, size, -1)
    if left:
        found = torch.bmm(pieces, x.T.expand(n_pieces, -1, -1)).permute(2, 0, 1)
    else:
        found = torch.bmm(x.expand(n_pieces, -1, -1), pieces.transpose(1, 2)).transpose(0, 1)
    product = found.reshape(len(x), cut).contiguous()
    return product if cut == len(weight) else torch.cat([product, functional.linear(x, weight[cut:])], dim=-1)
