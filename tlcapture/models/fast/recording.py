"""A step of a model recorded as a CUDA graph, which a replay runs again without Python and without launches.

A recorded step reads and writes the tensors of the time of its recording: inputs are written into them before a
replay, and its results are the tensors that the recorded call returned.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any, Generic, TypeVar

import torch

Result = TypeVar("Result")


# A stream for each device, on which calls take turns: cuBLAS keeps up to 32 MiB for every stream that it has been used
# on, until the process ends. torch hands out its 32 streams of a priority again and again, and other threads have
# streams of priority 0: what they put on this one while a call is recorded would be recorded too.
_STREAMS: dict[torch.device, tuple[Lock, Any]] = {}


class Tape:
    """Records calls as CUDA graphs on a stream that all tapes share, and in a memory pool of its own.

    The first call of a shape has to run on the stream before it is recorded: libraries set themselves up in it.
    """

    def __init__(self, device: torch.device):
        if device not in _STREAMS:
            _STREAMS.setdefault(device, (Lock(), torch.cuda.Stream(device, priority=-1)))
        self._turn, self._stream = _STREAMS[device]
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, call: Callable[[], Result]) -> Result:
        """Run a call on the stream, after the current stream's past work and before its future work."""
        with self._alone():
            return call()

    def record(self, call: Callable[[], Result]) -> RecordedCall[Result]:
        """Record a call, which is not run. Raises `RuntimeError` if it cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        with self._alone(), _without_collection():
            # Other threads, which copy and write, may go on.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                result = call()
            except BaseException:
                with suppress(RuntimeError):  # the first error says more
                    graph.capture_end()
                raise
            graph.capture_end()
        return RecordedCall(graph, result)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self._stream.device)
        with self._turn:
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    yield
            finally:
                # After an error too: what was queued may still write to the buffers, which are freed then.
                current.wait_stream(self._stream)


class RecordedCall(Generic[Result]):
    """A recorded call and what it returned: tensors that every replay overwrites.

    Attributes:
        holds: the tensors that the call read, which must stay in place.
    """

    holds: Any = None

    def __init__(self, graph: Any, result: Result):
        self._graph = graph
        self._result = result

    def replay(self) -> Result:
        """Run the call again on the current stream."""
        self._graph.replay()
        return self._result


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep Python from freeing other tensors and graphs in between."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
