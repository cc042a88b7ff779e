"""Stand-ins for what torch offers for GPUs only where it was built for them."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from tests.pretend_cuda import memory, operators, streams

_BYTES = 80 * 2**30
_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # by kind of device: 0 is the CPU, 1 is CUDA
# Of `DeviceGuardImplInterface`, as it is declared.
_N_METHODS, _GET_DEVICE = 40, 2
_KEPT: list[Any] = []


def pretend() -> None:
    """Let torch take this machine for one with a GPU, for as long as this process runs."""
    if torch.cuda.is_available() or torch.version.cuda is not None:
        raise RuntimeError("a GPU is pretended where torch was built without CUDA")
    _borrow_the_guard_of_the_cpu()
    operators.register()
    for name, stub in _CUDA.items():
        setattr(torch.cuda, name, stub)
    torch.Tensor.record_stream = _record_stream
    torch.Tensor.is_pinned = lambda self, device=None: memory.is_pinned(self)
    torch.Tensor.pin_memory = _pin
    torch.autograd._engine_run_backward = torch.autograd.graph._engine_run_backward = _no_gradients
    torch.UntypedStorage.clone = _clone
    for name in ("empty", "zeros", "ones"):
        setattr(torch, name, _that_pins(getattr(torch, name)))


def _borrow_the_guard_of_the_cpu() -> None:
    """Let torch have what switches devices, without which it refuses to index: that of the CPU, with another name."""
    with open("/proc/self/maps") as maps:
        path = next(line.split()[-1] for line in maps if line.rstrip().endswith("libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(ctypes.CDLL(path), _GUARDS)
    methods = ctypes.cast(ctypes.c_void_p.from_address(guards[0]).value, ctypes.POINTER(ctypes.c_void_p))
    ours = (ctypes.c_void_p * _N_METHODS)(*methods[:_N_METHODS])
    ours[_GET_DEVICE] = ctypes.cast(_the_gpu, ctypes.c_void_p).value
    guard = ctypes.pointer(ours)
    _KEPT.extend((ours, guard))
    guards[1] = ctypes.addressof(guard)


@ctypes.CFUNCTYPE(ctypes.c_uint16, ctypes.c_void_p)
def _the_gpu(guard: int) -> int:
    """The current device, as torch returns it: its kind, CUDA, in the low byte and its index in the high one."""
    return 1


def _record_stream(self: torch.Tensor, stream: streams.Stream) -> None:
    memory.block_of(self).lent.add(stream.queue)


def _pin(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    return memory.pinned(self.shape, self.dtype).copy_(self) if type(self) is torch.Tensor else self


class BeyondPretenceError(BaseException):
    """Something that the pretended GPU cannot do."""


def _no_gradients(*args: Any, **options: Any) -> Any:
    raise BeyondPretenceError("torch asks its own library for the streams of a backward pass")


def _clone(self: torch.UntypedStorage) -> torch.UntypedStorage:
    flat = torch.empty(0, dtype=torch.uint8, device=self.device)
    return flat.set_(self).clone().untyped_storage()


def _that_pins(make: Any) -> Any:
    def made(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        found: torch.Tensor = make(*size, **options)
        return found.pin_memory() if pin_memory else found

    made.__name__ = make.__name__
    return made


class _Device(nullcontext[None]):
    """Stands in for `torch.cuda.device`."""

    def __init__(self, device: Any):
        super().__init__()
        self.idx = 0


def _set_sync_debug_mode(mode: Any) -> None:
    streams.SYNC_DEBUG[0] = mode


_CUDA: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "device": _Device,
    "get_device_name": lambda device=None: "a pretended GPU",
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: SimpleNamespace(
        name="a pretended GPU", major=9, minor=0, total_memory=_BYTES, multi_processor_count=100
    ),
    "is_bf16_supported": lambda including_emulation=True: True,
    "mem_get_info": lambda device=None: (_BYTES, _BYTES),
    "memory_reserved": lambda device=None: 0,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "empty_cache": lambda: None,
    "ipc_collect": lambda: None,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: None,
    "synchronize": lambda device=None: streams.synchronise_all(),
    "set_sync_debug_mode": _set_sync_debug_mode,
    "get_sync_debug_mode": lambda: {"default": 0, "warn": 1, "error": 2}[streams.SYNC_DEBUG[0]],
    "Stream": streams.Stream,
    "Event": streams.Event,
    "stream": streams.on_stream,
    "current_stream": lambda device=None: streams.Stream(queue=streams.current()),
    "default_stream": lambda device=None: streams.Stream(queue=streams.DEFAULT),
    "CUDAGraph": streams.Graph,
    "graph_pool_handle": streams.pool_handle,
    "is_current_stream_capturing": lambda: streams.current().graph is not None,
}
