"""Streams, events and graphs of a pretended GPU, which notice what only luck would order.

Each stream has a clock: the time of its own work, and how far it has waited for that of others. Work that reads what
another stream wrote, or writes what another reads or wrote, is a fault unless it comes after by a wait; so is work on
memory that another stream may still use. Copies between the GPU and pinned memory that are not waited for are done as
late as that allows; until then, a copy's target has no numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.pretend_cuda.memory import Block, on_free, poison
from tests.pretend_cuda.regions import Region, overlap

N_STREAMS = 32  # of each priority, which torch hands out again and again
LOCK = threading.RLock()
FAULTS: list[str] = []  # since a test began


class FaultError(BaseException):
    """What a GPU might do at another time than was meant; no `except Exception` hides it."""


def fault(message: str) -> FaultError:
    """Note a fault; returns it, to be raised where that is possible."""
    FAULTS.append(message)
    return FaultError(message)


Clock = dict["Queue", int]
Used = tuple[Block, Region]


class Queue:
    """What stands behind a stream: the time of its work, and the work of others that comes before what comes next."""

    def __init__(self, name: str):
        self.name = name
        self.time = 0
        self.clock: Clock = {}
        self.waiting: list[Copy] = []
        self.freed: list[Block] = []  # memory that its next allocation may get
        self.graph: Graph | None = None  # which is being recorded

    def __repr__(self) -> str:
        return self.name

    def now(self) -> Clock:
        return {**self.clock, self: self.time}

    def comes_after(self, other: Queue, time: int) -> bool:
        """Whether what this queue does next comes after the work of another at a time."""
        return other is self or max(self.clock.get(other, 0), HOST.get(other, 0)) >= time


class Copy:
    """A copy that has been asked for."""

    def __init__(self, queue: Queue, on_gpu: Used, run: Callable[[], None], *, writes_gpu: bool):
        self.queue, self.time, self._run = queue, queue.time, run
        self.is_done = False
        self.region, self.writes_gpu = on_gpu[1], writes_gpu
        queue.waiting.append(self)
        on_gpu[0].waiting.append(self)

    def do(self) -> None:
        """Do it, after those before it on its stream."""
        for each in list(self.queue.waiting):
            if each.time <= self.time and not each.is_done:
                each.is_done = True
                self.queue.waiting.remove(each)
                each._run()


HOST: Clock = {}  # the work that Python has waited for
_QUEUES: dict[tuple[int, int], Queue] = {}
_made = {0: 0, -1: 0}


def merge(clock: Clock, other: Clock) -> None:
    """Let a clock come after another one."""
    for queue, time in other.items():
        clock[queue] = max(clock.get(queue, 0), time)


def wait(clock: Clock) -> None:
    """Let Python wait: copies up to then are done."""
    merge(HOST, clock)
    _do_copies(clock)


def _do_copies(clock: Clock) -> None:
    for queue, time in clock.items():
        for each in list(queue.waiting):
            if each.time <= time and not each.is_done:
                each.do()


class Stream:
    """Stands in for `torch.cuda.Stream`."""

    def __init__(self, device: Any = None, priority: int = 0, queue: Queue | None = None):
        self.device, self.priority = torch.device("cuda", 0), priority
        if queue is None:
            with LOCK:
                number = _made[priority] % N_STREAMS
                _made[priority] += 1
                queue = _QUEUES.setdefault((priority, number), Queue(f"stream {number} of priority {priority}"))
        self.queue = queue

    @property
    def cuda_stream(self) -> int:
        return id(self.queue)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.queue is self.queue

    def __hash__(self) -> int:
        return hash(self.queue)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: Event) -> None:
        with LOCK:
            merge(self.queue.clock, event.clock)
            _do_copies(event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        synchronise(self.queue)

    def query(self) -> bool:
        return not self.queue.waiting


class Event:
    """Stands in for `torch.cuda.Event`."""

    def __init__(self, *args: Any, **options: Any):
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        with LOCK:
            self.clock = (current() if stream is None else stream.queue).now()

    def wait(self, stream: Stream | None = None) -> None:
        (Stream(queue=current()) if stream is None else stream).wait_event(self)

    def synchronize(self) -> None:
        with LOCK:
            wait(self.clock)

    def query(self) -> bool:
        return not any(each.time <= time for queue, time in self.clock.items() for each in queue.waiting)


DEFAULT = Queue("the default stream")
_OF_THREAD = threading.local()
SYNC_DEBUG = ["default"]


def current() -> Queue:
    """The queue of this thread's current stream."""
    queue: Queue = getattr(_OF_THREAD, "queue", DEFAULT)
    return queue


@contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    """Stands in for `torch.cuda.stream`."""
    if stream is None:
        yield
        return
    before, _OF_THREAD.queue = current(), stream.queue
    try:
        yield
    finally:
        _OF_THREAD.queue = before


def synchronise(queue: Queue) -> None:
    """Let Python wait for a queue, as a read of a number does."""
    if SYNC_DEBUG[0] == "error":
        raise RuntimeError("called a synchronizing CUDA operation")
    if queue.graph is not None:
        queue.graph.is_broken = True
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
    with LOCK:
        wait(queue.now())


def synchronise_all() -> None:
    """Stands in for `torch.cuda.synchronize`."""
    for queue in [DEFAULT, *_QUEUES.values()]:
        synchronise(queue)


def use(queue: Queue, reads: list[Used], writes: list[Used], what: object) -> None:
    """Check and note what the next work of a queue reads and writes."""
    queue.time += 1
    for is_write, used in ((False, reads), (True, writes)):
        for block, region in used:
            others = [block.written, block.read] if is_write else [block.written]
            for (other, theirs), time in [pair for each in others for pair in each.items() if pair[0][0] is not queue]:
                if not queue.comes_after(other, time) and overlap(region, theirs):
                    raise fault(f"{what} on {queue} uses memory that {other} may be using, without a wait for it")
            for copy in list(block.waiting):
                if not copy.is_done and (is_write or copy.writes_gpu) and overlap(region, copy.region):
                    copy.do()
    for block, region in reads:
        block.read[queue, region] = queue.time
    for block, region in writes:
        block.written[queue, region] = queue.time


def allocated(queue: Queue) -> None:
    """Check that a queue's allocation gets no memory that others may be using."""
    freed, queue.freed = queue.freed, []
    for block in freed:
        for (other, _), time in (*block.read.items(), *block.written.items()):
            if other not in block.lent and not queue.comes_after(other, time):
                fault(f"memory freed on {queue} is given again while {other} may be using it: no record_stream")
                break


def _freed(block: Block) -> None:
    if block.graph is None:
        block.stream.freed.append(block)


on_free.append(_freed)


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`: what is recorded is run again, on the same memory."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.is_broken = False
        self._nodes: list[Callable[[], None]] = []
        self._reads: dict[Used, None] = {}
        self._writes: dict[Used, None] = {}
        self._own: list[Tensor] = []

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        queue = current()
        if queue is DEFAULT:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        if queue.graph is not None:
            raise RuntimeError("CUDA graphs are being captured on this stream already")
        self._queue, queue.graph = queue, self

    def capture_end(self) -> None:
        self._queue.graph = None
        if self.is_broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        for host in self._own:
            poison(host)

    def own(self, host: Tensor) -> None:
        """Note memory that was allocated during the recording, which stays as long as the graph."""
        self._own.append(host)

    def add(self, run: Callable[[], None], reads: list[Used], writes: list[Used]) -> None:
        """Record work."""
        self._nodes.append(run)
        self._reads |= dict.fromkeys(reads)
        self._writes |= dict.fromkeys(writes)

    def replay(self) -> None:
        with LOCK:
            outside = [block for block, _ in (*self._reads, *self._writes) if block.address and block.graph is not self]
            if any(each.is_freed for each in outside):
                raise fault("a recorded step is replayed, but memory that it reads or writes has been freed")
            use(current(), list(self._reads), list(self._writes), "a replay")
            for run in self._nodes:
                run()

    def reset(self) -> None:
        self._nodes.clear()


def pool_handle() -> tuple[int, int]:
    """Stands in for `torch.cuda.graph_pool_handle`."""
    return (0, 1)
