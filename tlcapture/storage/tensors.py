"""Tensors from files, which may be of any kind that torch can store."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_plain(value: Any) -> TypeGuard[Tensor]:
    """Whether a value is a tensor of real floats that a file holds number by number.

    No sparse, quantised or nested one, none without data, and none that repeats a few numbers over any
    shape: a view of another kind can claim more than memory holds.
    """
    if not isinstance(value, Tensor) or value.is_nested or value.layout != torch.strided or value.is_meta:
        return False
    return value.dtype in _FLOATS and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def described(value: Any) -> str:
    """What came instead, in a few words."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.is_nested:
        return "a nested tensor"
    kinds = [str(value.layout), str(value.dtype), str(value.device)]
    return f"a tensor {list(value.shape)} of {', '.join(kind.removeprefix('torch.') for kind in kinds)}"
