"""Which bytes of a block of memory a tensor has."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from torch import Tensor


class Region(NamedTuple):
    """The numbers of a tensor: where the first one is, in bytes, and those along each axis."""

    first: int
    shape: tuple[int, ...]
    steps: tuple[int, ...]
    itemsize: int

    @classmethod
    def of(cls, tensor: Tensor) -> Region:
        size = tensor.itemsize
        axes = [(n, step * size) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n != 1 and step]
        shape, steps = tuple(n for n, _ in axes), tuple(step for _, step in axes)
        return cls(tensor.storage_offset() * size, shape if tensor.numel() else (0,), steps, size)

    @property
    def stop(self) -> int:
        """The byte after the last number."""
        return self.first + sum((n - 1) * step for n, step in zip(self.shape, self.steps, strict=False)) + self.itemsize


@cache
def overlap(one: Region, other: Region) -> bool:
    """Whether two regions of a block share a byte."""
    if 0 in (*one.shape, *other.shape) or one.stop <= other.first or other.stop <= one.first:
        return False
    if one == other:
        return True
    return bool(np.intersect1d(_bytes(one), _bytes(other)).size)


def _bytes(region: Region) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    found = np.array([region.first])
    for n, step in zip((*region.shape, region.itemsize), (*region.steps, 1), strict=True):
        found = (found[:, None] + np.arange(n) * step).ravel()
    return found
