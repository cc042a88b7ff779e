"""How far activations deviate from those of Hugging Face, and how far they may."""

from __future__ import annotations

import torch
from torch import Tensor

# As shares of a token's norm; rounding in 16 bits grows with depth.
BOUNDS = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 3e-1}


def deviation(ours: Tensor, theirs: Tensor) -> float:
    """The largest norm of a difference along the last axis, as a share of that of `theirs`; NaN if either has NaN."""
    ours, theirs = ours.float().cpu(), theirs.float().cpu()
    smallest = torch.finfo(torch.float32).tiny
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=smallest)).max())


def allowed(dtype: torch.dtype, rounding: float | None) -> float:
    """The largest deviation allowed: of a dtype, or four times Hugging Face's own `rounding` and 0.001, if measured."""
    return BOUNDS[dtype] if rounding is None else 4 * rounding + 1e-3
