"""A Triton kernel for a GPU that reads the logits of a large vocabulary once.

Importing this module raises `ImportError` where Triton, which comes with torch for CUDA and ROCm, is not installed.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 4096  # neighbours in the vocabulary that one program reads


@triton.jit
def scan(  # type: ignore[no-untyped-def]  # Triton reads annotations as types of its own
    logits,
    actual,
    maxima,
    above,
    largest,
    total,
    width,
    stride,
    n_groups,
    n_blocks,
    group_size: tl.constexpr,
    block_size: tl.constexpr,
):
    """For a block of a row `[width]` of logits: the maxima of its groups, and how many logits are above `actual`.

    `total` is the sum of `exp(logit - largest)` over the block, `largest` the block's largest logit.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    at = block * block_size + tl.arange(0, block_size)
    values = tl.load(logits + row * stride + at, mask=at < width, other=-float("inf")).to(tl.float32)
    most = tl.max(values, axis=0)
    # A block of tokens that cannot follow has a sum of 0, not of exp(-inf + inf).
    terms = tl.exp(values - tl.where(most == -float("inf"), 0.0, most))
    n_above = tl.sum((values > tl.load(actual + row).to(tl.float32)).to(tl.int32), axis=0)
    of_block = row * n_blocks + block
    tl.store(largest + of_block, most)
    tl.store(total + of_block, tl.sum(terms, axis=0))
    tl.store(above + of_block, n_above)
    group = block * (block_size // group_size) + tl.arange(0, block_size // group_size)
    found = tl.max(tl.reshape(values, (block_size // group_size, group_size)), axis=1)
    tl.store(maxima + row * n_groups + group, found.to(maxima.dtype.element_ty), mask=group < n_groups)
