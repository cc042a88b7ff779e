"""Copies between main memory and a device that do not hold up the work queued on the device."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

_IN_TRANSIT = 2**28  # bytes


def upload(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Integers as a tensor `[n]` on a device."""
    tensor = torch.tensor(list(numbers), dtype=torch.long)
    # CUDA stages few bytes at once, pinned or not; MPS would read them later, when their memory may be another's.
    return tensor.to(device, non_blocking=device.type == "cuda")


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


class Copies:
    """Copies to main memory on a stream of their own, while the model goes on.

    Pinned memory is reused by torch once the tensors in it are gone. Copies to memory that is not pinned go through
    pinned memory of at most `_IN_TRANSIT` bytes.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)
        self._in_transit: deque[tuple[Any, Tensor, Tensor]] = deque()  # event, pinned memory, target
        self._lock = threading.Lock()

    def lend(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor on the device from being reused before its copies are done."""
        tensor.record_stream(self._stream)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Begin to copy a contiguous tensor as it will be after the work queued so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        pinned = target if target.is_pinned() else in_main_memory(source.shape, source.dtype, pinned=True)
        with torch.cuda.stream(self._stream):
            pinned.copy_(source, non_blocking=True)
        if pinned is not target:
            with self._lock:
                self._in_transit.append((self.mark(), pinned, target))
            self._land(_IN_TRANSIT)

    def mark(self) -> Any:
        """A mark of the copies begun so far, for `wait`."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def wait(self, mark: Any) -> None:
        """Wait until the copies up to a mark are done."""
        mark.synchronize()
        self._land(0)

    def hold_up_device(self) -> None:
        """Let the work queued from now on begin after the copies begun so far."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _land(self, at_most: int) -> None:
        """Move to their targets what is in transit, oldest first, until no more than so many bytes are."""
        with self._lock:
            while sum(pinned.nbytes for _, pinned, _ in self._in_transit) > at_most:
                event, pinned, target = self._in_transit.popleft()
                event.synchronize()
                target.copy_(pinned)


def in_main_memory(shape: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """An uninitialised tensor in main memory, pinned if that is asked for and can be had."""
    if pinned:
        with suppress(RuntimeError):
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
    return torch.empty(tuple(shape), dtype=dtype)
