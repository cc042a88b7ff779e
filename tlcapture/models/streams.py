"""Work of several threads on one accelerator: each thread has its own stream, so that none waits for the others."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

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
