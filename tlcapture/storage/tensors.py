"""Checks of tensors that were read from files, which can be of any kind that torch stores."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_plain(value: Any) -> TypeGuard[Tensor]:
    """Whether a value is a dense tensor of real floats with all its numbers in storage.

    Sparse, quantised, nested and meta tensors are not plain. Neither are expanded views, which repeat a few stored
    numbers over a shape that can be larger than memory.
    """
    if not isinstance(value, Tensor) or value.is_nested or value.layout != torch.strided or value.is_meta:
        return False
    return value.dtype in _FLOATS and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def described(value: Any) -> str:
    """A short description of a value that is not a plain tensor, for error messages."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.is_nested:
        return "a nested tensor"
    kinds = [str(value.layout), str(value.dtype), str(value.device)]
    return f"a tensor {list(value.shape)} of {', '.join(kind.removeprefix('torch.') for kind in kinds)}"
