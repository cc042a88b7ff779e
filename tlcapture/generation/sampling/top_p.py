"""Top-p without sorting the vocabulary by index, which takes as long as a decode step on a CPU.

The mask is Hugging Face's (`TopPLogitsWarper`): tokens from some score on stay. A row's likeliest tokens usually
reach the share to keep, and a partial sort finds them. If they do not, or rounding decides what stays, a row's
scores are sorted without their indices; if equal scores must be told apart, `TopPLogitsWarper` sorts them itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlcapture.shapes import LastLogits

_PRESELECTED = 128  # tokens
_DOUBT = 2e-5  # how far rounding moves cumulative probabilities, relative to them


class TopP:
    """Leaves the fewest likeliest tokens whose probabilities reach `top_p`, and gives all others -inf.

    On an accelerator the whole vocabulary is sorted, which is fast there and waits for nothing on the device.
    """

    def __init__(self, top_p: float):
        from transformers import TopPLogitsWarper

        self._limit = 1 - top_p
        self._by_sorting = TopPLogitsWarper(top_p=top_p)

    def __call__(self, ids: Any, scores: LastLogits) -> LastLogits:
        """The scores `[batch, d_vocab]` in which the tokens that do not stay have -inf."""
        if scores.device.type != "cpu":
            return self._by_sorting(ids, scores)
        lowest, is_certain = self._among_likeliest(scores)
        for row in (~is_certain).nonzero()[:, 0].tolist():
            lowest[row], is_certain[row] = self._among_all(scores[row])
        found = torch.where(scores >= lowest[:, None], scores, -torch.inf)
        for row in (~is_certain).nonzero()[:, 0].tolist():
            found[row : row + 1] = self._by_sorting(ids, scores[row : row + 1])
        return found

    def _among_likeliest(self, scores: LastLogits) -> tuple[Tensor, Tensor]:
        """The lowest score that stays and whether it is certain, `[batch]`."""
        ordered = scores.topk(min(_PRESELECTED, scores.shape[-1])).values
        totals = (scores - ordered[:, :1]).exp_().sum(dim=-1, keepdim=True, dtype=torch.float64)
        shares = (ordered - ordered[:, :1]).exp_().double().div_(totals)
        left = 1 - shares.cumsum(dim=-1) + shares  # the probability of a token and of all less likely ones
        stays = left > self._limit
        stays[:, 0] = True
        last = stays.sum(dim=-1, keepdim=True) - 1
        after = (last + 1).clamp(max=ordered.shape[1] - 1)
        lowest, highest_removed = ordered.gather(1, last), ordered.gather(1, after)
        is_close = (left - self._limit).abs_() < _DOUBT * self._limit + 1e-9
        is_certain = (highest_removed < lowest) & totals.isfinite() & ~is_close.any(dim=-1, keepdim=True)
        return lowest[:, 0], is_certain[:, 0]

    def _among_all(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest score that stays in a row `[d_vocab]`, as in `TopPLogitsWarper`; ties are never certain."""
        ordered = torch.from_numpy(np.sort(scores.numpy()))
        removed = ordered.softmax(dim=-1).cumsum(dim=-1) <= self._limit
        removed[-1] = False
        n_removed = removed.sum()
        lowest = ordered[n_removed]
        return lowest, (n_removed == 0) & ordered[-1].isfinite() | (ordered[n_removed - 1] < lowest)
