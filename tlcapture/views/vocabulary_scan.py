"""What the logit lens needs of all logits of a large vocabulary, in one pass over them where a GPU has Triton.

Without it, a GPU reads and writes each logit many times: for the likeliest tokens, the rank and the softmax.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlcapture.shapes import Logits
from tlcapture.text import first_line

GROUP = 64  # neighbours in the vocabulary that are compared together
_log = logging.getLogger(__name__)
_without: list[str] = []  # why there is no kernel, once that is known


class Scan(NamedTuple):
    """What is known of each row of logits: the largest of each whole group of neighbours, how many are above the actual
    one, the largest of all, and the sum of `exp(logit - largest)`.
    """

    maxima: Float[Tensor, "n_predictions n_groups"]
    n_above: Int[Tensor, " n_predictions"]
    largest: Float[Tensor, " n_predictions"]
    total: Float[Tensor, " n_predictions"]


def scanned(logits: Logits, actual: Float[Tensor, " n_predictions"]) -> Scan | None:
    """The scan of logits on a GPU; `None` where they are elsewhere, or where its kernel cannot be compiled.

    Args:
        logits: of each prediction, `[n_predictions, d_vocab]`.
        actual: the logit of each actual next token.
    """
    if not logits.is_cuda or _without or not logits.numel() or logits.stride(-1) != 1:
        return None
    try:
        from tlcapture.views import vocabulary_kernel as kernel

        return scan_with(kernel, logits, actual)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of many kinds: no Triton, no C compiler, a GPU that Triton does not know
        _without.append(first_line(error))
        _log.info("the logit lens is slower, since its kernel cannot be compiled: %s", first_line(error))
        return None


def scan_with(kernel: Any, logits: Logits, actual: Float[Tensor, " n_predictions"]) -> Scan:
    """As `scanned`, by a given kernel and on any device."""
    n_rows, width = logits.shape
    n_blocks, n_groups = -(-width // kernel.BLOCK), width // GROUP
    maxima = logits.new_empty(n_rows, n_groups)
    above = torch.empty(n_rows, n_blocks, dtype=torch.int32, device=logits.device)
    of_blocks, totals = (torch.empty(n_rows, n_blocks, device=logits.device) for _ in range(2))
    sizes = (width, logits.stride(0), n_groups, n_blocks)
    with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
        kernel.scan[n_rows, n_blocks](
            logits,
            actual.contiguous(),
            maxima,
            above,
            of_blocks,
            totals,
            *sizes,
            group_size=GROUP,
            block_size=kernel.BLOCK,
        )
    largest = of_blocks.amax(dim=-1)
    total = totals.mul_((of_blocks - largest[:, None]).exp_()).sum(dim=-1)
    return Scan(maxima, above.sum(dim=-1), largest, total)
