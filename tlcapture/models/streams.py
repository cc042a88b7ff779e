"""Work of several threads on one accelerator: each thread has its own stream, so that none waits for the others."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

import torch

_OF_THREAD = threading.local()


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """A context in which this thread's work on a CUDA device does not wait for that of other threads."""
    if device.type != "cuda":
        return nullcontext()
    streams = _OF_THREAD.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return torch.cuda.stream(streams[device])
