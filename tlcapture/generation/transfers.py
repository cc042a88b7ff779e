"""Copies between main memory and a device that do not hold up the work queued on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Integers as a tensor `[n]` on a device."""
    tensor = torch.tensor(list(numbers), dtype=torch.long)
    return tensor.to(device, non_blocking=True)  # few bytes are staged at once, pinned or not


class Download:
    """A small tensor on its way to main memory; reading it waits for the copy, not for work queued after it."""

    def __init__(self, tensor: Tensor):
        self._copy = tensor.to("cpu", non_blocking=tensor.is_cuda)  # into pinned memory
        self._event: Any = None
        if tensor.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> list[int]:
        """The numbers."""
        if self._event is not None:
            self._event.synchronize()
        return [int(number) for number in self._copy.tolist()]
