"""The cache that views read: the activations of one prompt's run, by hook name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Cache = Mapping[str, Tensor]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack`, without a copy if the tensors are evenly spaced in one storage, as they are in one run or
    one file."""
    first = tensors[0]
    offsets = [tensor.storage_offset() for tensor in tensors]
    distance = offsets[1] - offsets[0] if len(tensors) > 1 else first.numel()
    even = distance > 0 and offsets == list(range(offsets[0], offsets[0] + len(tensors) * distance, distance))
    alike = all(
        tensor.shape == first.shape
        and tensor.stride() == first.stride()
        and tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for tensor in tensors
    )
    if not (even and alike):
        return torch.stack(list(tensors))
    return first.as_strided((len(tensors), *first.shape), (distance, *first.stride()))
