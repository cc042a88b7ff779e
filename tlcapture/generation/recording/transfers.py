"""Copies between main memory and a device that do not hold up the work queued on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

_IN_TRANSIT = 2**28  # bytes
_PIECE = 2**24  # bytes
# A stream for each device: torch has 32, and would soon give a new one that another thread has for the lens.
_STREAMS: dict[torch.device, Any] = {}
Mark = tuple[Any, "Future[None] | None"]  # an event on the stream, and the last arrival


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

    Copies to memory that is not pinned go through pinned memory, of which at most `_IN_TRANSIT` bytes are taken, and
    from there to their target in a thread.
    """

    def __init__(self, device: torch.device):
        self._device = device
        if device not in _STREAMS:
            _STREAMS.setdefault(device, torch.cuda.Stream(device))
        self._stream = _STREAMS[device]
        self._thread = ThreadPoolExecutor(1, "copies")
        self._in_transit: deque[tuple[int, Future[None]]] = deque()  # bytes, and the arrival at the target

    def lend(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor on the device from being reused before its copies are done."""
        tensor.record_stream(self._stream)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Begin to copy a contiguous tensor as it will be after the work queued so far, to a contiguous one."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        if target.is_pinned():
            with torch.cuda.stream(self._stream):
                target.copy_(source, non_blocking=True)
            return
        n_numbers = max(1, _PIECE // source.itemsize)
        for piece, onto in zip(source.view(-1).split(n_numbers), target.view(-1).split(n_numbers), strict=True):
            self._arrive(_IN_TRANSIT - piece.nbytes)
            pinned = in_main_memory(piece.shape, piece.dtype, pinned=True)
            with torch.cuda.stream(self._stream):
                pinned.copy_(piece, non_blocking=True)
            self._in_transit.append((piece.nbytes, self._thread.submit(_land, self._event(), pinned, onto)))

    def mark(self) -> Mark:
        """A mark for `wait` that stands for the copies begun so far."""
        return self._event(), self._in_transit[-1][1] if self._in_transit else None

    def wait(self, mark: Mark) -> None:
        """Wait until the copies up to a mark have arrived; any thread may."""
        event, arrival = mark
        event.synchronize()
        if arrival is not None:
            arrival.result()

    def hold_up_device(self) -> None:
        """Let the work queued from now on begin after the copies begun so far have left the device."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _event(self) -> Any:
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def _arrive(self, at_most: int) -> None:
        """Wait until no more than so many bytes are in transit; the last copy stays, as the mark of all."""
        n_bytes = sum(each for each, _ in self._in_transit)
        while len(self._in_transit) > 1 and (n_bytes > at_most or self._in_transit[0][1].done()):
            each, arrival = self._in_transit.popleft()
            arrival.result()
            n_bytes -= each


def _land(event: Any, pinned: Tensor, target: Tensor) -> None:
    event.synchronize()
    target.copy_(pinned)


def in_main_memory(shape: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """An uninitialised tensor in main memory, pinned if requested and possible.

    Pinning memory takes longer than filling it, but torch reuses it once the tensors in it are gone.
    """
    if pinned:
        with suppress(RuntimeError):
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
    return torch.empty(tuple(shape), dtype=dtype)
