"""Memory of a pretended GPU, and pinned memory: tensors of torch whose numbers are in main memory.

A tensor in main memory is passed on by DLPack, where its device is a GPU. torch asks such a tensor for no more than the
address of its numbers, so views, strides and storages are those of any tensor; what computes with it comes to
`operators`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

POISON = 0xFF  # in every byte of memory that nothing was written to: NaN in any float
_CUDA = 2
_DEVICE = 8  # bytes before the device in the content of a capsule, after an address

_content = ctypes.pythonapi.PyCapsule_GetPointer
_content.restype = ctypes.c_void_p
_content.argtypes = (ctypes.py_object, ctypes.c_char_p)

BLOCKS: dict[int, Block] = {}  # memory of the pretended GPU, by address
PINNED: set[int] = set()  # addresses of pinned memory
on_free: list[Callable[[Block], None]] = []  # called with a block that no tensor has any longer


class Block:
    """Memory of one storage on the pretended GPU.

    Attributes:
        address: where its numbers are in main memory; 0 if there are none.
        host: a tensor in main memory that has them, as long as one on the GPU does.
        stream: the stream on which it was allocated, and to whose later work it is given again.
        graph: the graph during whose recording it was allocated.
        written, read: the time of each stream's last use of a region.
        lent: the streams that `record_stream` has named.
        waiting: copies from or to it that have been asked for.
        is_freed: whether no tensor has it any longer.
    """

    def __init__(self, address: int, host: Callable[[], Any], stream: Any, graph: Any):
        self.address, self.host, self.stream, self.graph = address, host, stream, graph
        self.written: dict[tuple[Any, Any], int] = {}
        self.read: dict[tuple[Any, Any], int] = {}
        self.lent: set[Any] = set()
        self.waiting: list[Any] = []
        self.is_freed = False


def _passed_on(host: Tensor, device: int | None) -> Tensor:
    capsule = torch._C._to_dlpack(host)
    if device is not None:
        place = (ctypes.c_int32 * 2).from_address(_content(capsule, b"dltensor") + _DEVICE)
        place[0], place[1] = device, 0
    return torch._C._from_dlpack(capsule)


def on_gpu(host: Tensor, stream: Any, graph: Any) -> Tensor:
    """A tensor on the pretended GPU that takes over the memory of a new one in main memory."""
    if host.storage_offset():
        host = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype).copy_(host)
    address = host.data_ptr()
    if address:
        BLOCKS[address] = Block(address, weakref.ref(host), stream, graph)
        weakref.finalize(host, _free, address).atexit = False
    return _passed_on(host, _CUDA)


def _free(address: int) -> None:
    block = BLOCKS.pop(address)
    block.is_freed = True
    for call in on_free:
        call(block)


def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in main memory that says that it is pinned."""
    host = torch.empty(tuple(shape), dtype=dtype)
    poison(host)
    PINNED.add(host.data_ptr())
    weakref.finalize(host, PINNED.discard, host.data_ptr()).atexit = False
    return _passed_on(host, None)


def is_pinned(tensor: Tensor) -> bool:
    """Whether a tensor is in pinned memory."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in PINNED


def poison(host: Tensor) -> None:
    """Let a tensor in main memory have no numbers, and all that share its memory."""
    torch.empty(0, dtype=torch.uint8).set_(host.untyped_storage()).fill_(POISON)


def block_of(tensor: Tensor) -> Block:
    """The memory of a tensor on the pretended GPU."""
    address = tensor.untyped_storage().data_ptr()
    return BLOCKS[address] if address else Block(0, lambda: None, None, None)


def in_main_memory(tensor: Tensor) -> Tensor:
    """A view in main memory of a tensor on the pretended GPU."""
    flat = torch.empty(0, dtype=tensor.dtype)
    host = block_of(tensor).host()
    if host is None:  # there are no numbers
        return flat.new_empty(tensor.shape)
    return flat.set_(host.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
