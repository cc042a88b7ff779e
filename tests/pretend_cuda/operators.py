"""Operators on a pretended GPU: each computes in main memory, with the rules of a GPU about devices and waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from tests.pretend_cuda import memory, streams
from tests.pretend_cuda.regions import Region
from tests.pretend_cuda.streams import Used

_aten = torch.ops.aten
_CPU_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# Their results' shapes or values are read by Python.
_READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2", "unique_dim",
          "unique_consecutive", "repeat_interleave", "histc")  # fmt: skip
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "addmv", "addbmm", "dot", "_addmm_activation")
# Besides elementwise operators, those that take a number as a tensor without axes in main memory.
_TAKE_NUMBERS = (
    "where",
    "masked_fill",
    "masked_fill_",
    "index_fill",
    "index_fill_",
    "fill_",
    "fill",
    "full_like",
    "copy_",
)


@dataclass(frozen=True)
class Kind:
    """What is known of an operator from its schema.

    Attributes:
        name: its name without its overload.
        computes: whether it makes or writes numbers, and not only views of them.
        is_empty: whether its result has no numbers.
        takes_numbers: whether a tensor without axes may be in main memory.
        tensors: the places of arguments that are tensors.
        writes: the places and names of arguments that it writes.
        n_returns: the number of results.
    """

    name: str
    computes: bool
    is_empty: bool
    takes_numbers: bool
    tensors: frozenset[int]
    writes: tuple[tuple[int, str], ...]
    n_returns: int


@cache
def kind_of(op: Any) -> Kind:
    """What is known of an operator."""
    name = str(op.overloadpacket.__name__)
    arguments = list(enumerate(op._schema.arguments))
    return Kind(
        name,
        computes=not op.is_view and name != "set_",
        is_empty=name.startswith(("empty", "new_empty")),
        takes_numbers=torch.Tag.pointwise in op.tags or name in (*_TAKE_NUMBERS, *_INDEXED),
        tensors=frozenset(place for place, each in arguments if str(each.type) == "Tensor"),
        writes=tuple((n, each.name) for n, each in arguments if each.alias_info and each.alias_info.is_write),
        n_returns=len(op._schema.returns),
    )


def _softmax(x: Tensor, dim: int, half_to_float: bool, **out: Tensor) -> Tensor:
    return _aten._softmax(x.float() if half_to_float else x, dim, False, **out)


def _conv_depthwise(x: Tensor, weight: Tensor, size: Any, bias: Tensor | None, *options: Any) -> Tensor:
    return torch.conv2d(x, weight, bias, *options, groups=x.shape[1])


# Operators that main memory has not, or not for all dtypes.
_HERE: dict[Any, Callable[..., Any]] = {
    _aten._softmax.default: _softmax,
    _aten._softmax.out: _softmax,
    _aten._conv_depthwise2d.default: _conv_depthwise,
    _aten.histc.default: lambda x, *options: _aten.histc.default(x.double(), *options).to(x.dtype),
}


def compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """What torch calls for each operator on the pretended GPU that has no kernel of its own."""
    kind = kind_of(op)
    if not kind.computes:
        return op.redispatch(_CPU_KEY, *args, **kwargs)
    _check_devices(op, kind, args, kwargs)
    queue = streams.current()
    if kind.name in _READS or (kind.name in _INDEXED and _has_mask(args)):
        streams.synchronise(queue)
    with streams.LOCK:
        return _computed(op, kind, args, kwargs, queue)


def _computed(op: Any, kind: Kind, args: Any, kwargs: Any, queue: streams.Queue) -> Any:
    pairs: list[tuple[Tensor, Tensor]] = []  # tensors on the GPU, and their views in main memory

    def local(value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == "cuda":
            return torch.device("cpu")
        if not isinstance(value, Tensor) or not value.is_cuda:
            return value
        pairs.append((value, memory.in_main_memory(value)))
        return pairs[-1][1]

    here_args = _mapped(local, _with_tensors(kind, args))
    here_kwargs = {name: _mapped(local, value) for name, value in kwargs.items()}
    here_kwargs.pop("pin_memory", None)
    written = _written(kind, args, kwargs)
    reads = [_used(each) for each, _ in pairs if not any(each is other for other in written)]
    writes = [_used(each) for each in written]
    graph = queue.graph
    if graph is None:
        streams.use(queue, reads, writes, op)
    runs = graph is None or all(block.graph is graph or not block.address for block, _ in writes)
    here = _HERE.get(op, op)

    def again() -> Any:
        return here(*here_args, **here_kwargs)

    found = again() if runs or not written else _own_results(kind, here_args, here_kwargs)
    own = {id(each): there for there, each in pairs}
    made: list[tuple[Tensor, Used]] = []

    def there(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in own:
            there = own[id(value)]
            if value.shape == there.shape:
                return there
            grown = new(value.clone(), queue, made)  # an `out` that had no numbers yet
            return there.set_(grown)
        if kind.is_empty:
            memory.poison(value)
        return new(value, queue, made)

    result = _mapped(there, found)
    if graph is not None and not kind.is_empty:
        hosts = [host for host, _ in made]
        _record(graph, again, hosts, reads, [*writes, *(used for _, used in made)])
    elif graph is None:
        for _, (block, region) in made:
            block.written[queue, region] = queue.time
    return result


def _with_tensors(kind: Kind, args: Any) -> list[Any]:
    """Arguments in which a number that Python gives for a tensor is one."""
    return [
        torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        if isinstance(value, int | float) and place in kind.tensors
        else value
        for place, value in enumerate(args)
    ]


def _tensors(value: Any) -> list[Tensor]:
    """The tensors among arguments or results."""
    if isinstance(value, list | tuple):
        return [each for part in value for each in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Arguments or results, each of which has been changed."""
    if isinstance(value, list | tuple):
        return tuple(_mapped(change, each) for each in value)
    return change(value)


def _used(tensor: Tensor) -> Used:
    return memory.block_of(tensor), Region.of(tensor)


def new(host: Tensor, queue: streams.Queue, made: list[tuple[Tensor, Used]]) -> Tensor:
    """A tensor on the GPU that takes over a new one's memory."""
    streams.allocated(queue)
    found = memory.on_gpu(host, queue, queue.graph)
    made.append((memory.in_main_memory(found), _used(found)))
    if queue.graph is not None:
        queue.graph.own(made[-1][0])
    return found


def _record(graph: streams.Graph, again: Any, hosts: list[Tensor], reads: list[Used], writes: list[Used]) -> None:
    def run() -> None:
        found = again()
        if hosts:
            for host, each in zip(hosts, _tensors(found), strict=True):
                host.copy_(each)

    graph.add(run, reads, writes)


def _written(kind: Kind, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operator writes."""
    return _tensors([args[place] if place < len(args) else kwargs.get(name) for place, name in kind.writes])


def _own_results(kind: Kind, args: Any, kwargs: Any) -> Any:
    """What an operator that is recorded, and not run, returns: the arguments that it would have written."""
    written = _written(kind, args, kwargs)
    return None if not kind.n_returns else written[0] if kind.n_returns == 1 else tuple(written)


def _has_mask(args: Any) -> bool:
    return any(each.dtype in (torch.bool, torch.uint8) for each in _tensors(args[1]))


def _check_devices(op: Any, kind: Kind, args: Any, kwargs: Any) -> None:
    """Raise the errors that CUDA raises."""
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    given = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
    if kind.name in _PRODUCTS and any(not each.dtype.is_floating_point for each in given):
        raise RuntimeError(f'"{kind.name}_cuda" not implemented for {given[0].dtype}')
    if all(each.is_cuda for each in given):
        return
    indices = _tensors(args[1]) if kind.name in _INDEXED else []
    written = _written(kind, args, kwargs)
    for each in given:
        is_number = kind.takes_numbers and each.ndim == 0 and not any(each is other for other in written)
        if not (each.is_cuda or is_number or any(each is index for index in indices)):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({op})"
            )


def copy_into(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`target.copy_(source)`, at least one of them on the GPU."""
    if target.is_cuda and source.is_cuda:
        return compute(_aten.copy_.default, target, source, non_blocking)
    if source.ndim == 0 and target.is_cuda and target.ndim and not non_blocking:
        source = source.expand(target.shape)
    queue = streams.current()
    host = target if source.is_cuda else source
    is_late = non_blocking and memory.is_pinned(host)
    if not non_blocking:
        streams.synchronise(queue)
    elif queue.graph is not None:
        queue.graph.is_broken = True
        raise RuntimeError("CUDA error: a copy from or to main memory is not recorded here")
    with streams.LOCK:
        on_gpu = _used(source if source.is_cuda else target)
        streams.use(queue, *(([on_gpu], []) if source.is_cuda else ([], [on_gpu])), "a copy")
        here, onto = (memory.in_main_memory(each) if each.is_cuda else each for each in (source, target))
        if not is_late:
            onto.copy_(here)
            if not non_blocking:
                streams.wait(queue.now())
            return target
        if onto is target:
            # What is there until the copy is done.
            onto.copy_(torch.full((), memory.POISON, dtype=torch.uint8).expand(16).contiguous().view(onto.dtype)[0])

        def run() -> None:
            with torch.inference_mode(onto.is_inference()):
                onto.copy_(here)

        streams.Copy(queue, on_gpu, run, writes_gpu=target.is_cuda)
    return target


def to_copy(
    tensor: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: Any = None,
) -> Tensor:
    """`tensor.to(...)`, from or to the GPU."""
    if not tensor.is_cuda:
        like = torch.empty_like(tensor, dtype=dtype, memory_format=memory_format)
        on_gpu = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cuda")
        return copy_into(on_gpu, tensor, non_blocking)
    if device is None or device.type == "cuda":
        options = {"dtype": dtype, "memory_format": memory_format}
        return compute(_aten._to_copy.default, tensor, **options)
    if dtype is not None and dtype != tensor.dtype:
        tensor = compute(_aten._to_copy.default, tensor, dtype=dtype)
    if memory_format is None or memory_format == torch.preserve_format:
        like = torch.empty_like(memory.in_main_memory(tensor))
    else:
        like = torch.empty(tensor.shape, dtype=tensor.dtype, memory_format=memory_format)
    if non_blocking and device.type == "cpu":
        flat = memory.pinned((like.untyped_storage().nbytes() // like.itemsize,), like.dtype)
        like = flat.as_strided(like.shape, like.stride())
    return copy_into(like, tensor, non_blocking)


_LIBRARIES: list[Any] = []


def register() -> None:
    """Let torch call this module for operators on the GPU."""
    every = torch.library.Library("_", "IMPL", "CUDA")
    every.fallback(compute)
    own = torch.library.Library("aten", "IMPL", "CUDA")
    own.impl("copy_", copy_into, "CUDA")
    own.impl("_to_copy", to_copy, "CUDA")
    # Its own kernel takes indices to the GPU through pinned memory of its own.
    own.impl("index.Tensor", partial(compute, _aten.index.Tensor), "CUDA")
    _LIBRARIES.extend((every, own))
