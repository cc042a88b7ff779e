"""Work on an accelerator without waits: a stream for each thread, and numbers that are sent along with the work."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_OF_THREAD = threading.local()
# Streams of threads that have ended. Libraries of CUDA keep memory for every stream that they have been used on.
_FREE: dict[torch.device, list[Any]] = {}


class _Taken:
    """The streams of a thread by device, which others may take once it has ended."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def on(self, device: torch.device) -> Any:
        """The thread's stream on a device."""
        if device not in self._streams:
            free = _FREE.setdefault(device, [])
            try:
                self._streams[device] = free.pop()
            except IndexError:
                self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def __del__(self, free: dict[torch.device, list[Any]] = _FREE) -> None:
        for device, stream in self._streams.items():
            free[device].append(stream)


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """A context in which this thread's work on a CUDA device does not wait for that of other threads."""
    if device.type != "cuda":
        return nullcontext()
    if not hasattr(_OF_THREAD, "taken"):
        _OF_THREAD.taken = _Taken()
    return torch.cuda.stream(_OF_THREAD.taken.on(device))


def upload(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Integers as a tensor `[n]` on a device, for which neither side waits."""
    tensor = torch.tensor(list(numbers), dtype=torch.long)
    # CUDA stages few bytes at once, pinned or not; MPS would read them later, when their memory may be another's.
    return tensor.to(device, non_blocking=device.type == "cuda")
