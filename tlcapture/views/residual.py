"""The residual stream at every point of every layer.

Residual points, in the order they are computed, share one buffer: `residual_in` of layer 0, then for
each layer `after_attn` and `residual_out`. `residual_in` of a later layer is `residual_out` of the one
before it, so it takes no room of its own.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from tlcapture.errors import InputError
from tlcapture.shapes import LayerOutputs, Residual, ResidualPoints
from tlcapture.views import Cache

POINTS = ("residual_in", "after_attn", "residual_out")


@dataclass(frozen=True, repr=False)
class ResidualStream:
    """The residual stream of some tokens, and the attention outputs where they were captured.

    `points` is `[2 * n_layers + 1, n_tokens, d_model]`, `attn_out` `[n_layers, n_tokens, d_model]`.
    """

    points: ResidualPoints
    attn_out: LayerOutputs | None = None

    def __repr__(self) -> str:
        dtype = str(self.points.dtype).removeprefix("torch.")
        attn_out = ", with attn_out" if self.attn_out is not None else ""
        return (
            f"ResidualStream({self.n_layers} layers, {self.n_tokens} tokens, d_model {self.points.shape[-1]}, "
            f"{dtype}{attn_out})"
        )

    @property
    def n_layers(self) -> int:
        return (self.points.shape[0] - 1) // 2

    @property
    def n_tokens(self) -> int:
        return int(self.points.shape[1])

    def at(self, layer: int, point: str) -> Residual:
        """The activations `[n_tokens, d_model]` of a layer at a residual point, or its `attn_out`."""
        if not 0 <= layer < self.n_layers:
            raise InputError(f"no layer {layer}: the model has layers 0 to {self.n_layers - 1}")
        if point == "attn_out":
            if self.attn_out is None:
                raise InputError("attn_out was not captured: capture again with --capture-attn")
            return self.attn_out[layer]
        return self.points[point_index(layer, point)]

    def tokens(self, start: int, stop: int, dtype: torch.dtype) -> ResidualStream:
        """A copy of the tokens `start` to `stop` in a dtype and in memory of its own."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor[:, start:stop].to(dtype, copy=True, memory_format=torch.contiguous_format)

        return ResidualStream(copy(self.points), None if self.attn_out is None else copy(self.attn_out))


def point_index(layer: int, point: str) -> int:
    """Where a layer's residual point lies on the first axis of the buffer."""
    if point not in POINTS:
        raise InputError(f"no residual point {point!r}: choose one of {', '.join(POINTS)}, attn_out")
    return 2 * layer + POINTS.index(point)


def residual_hooks(n_layers: int, hook_names: Set[str], *, attn_out: bool = False) -> list[str]:
    """The activations the view reads, the residual points first and in the buffer's order."""
    points = ["blocks.0.hook_resid_pre"]
    for layer in range(n_layers):
        mid = f"blocks.{layer}.hook_resid_mid"
        # Parallel blocks never compute a residual between attention and MLP.
        points += [mid if mid in hook_names else f"blocks.{layer}.hook_attn_out", f"blocks.{layer}.hook_resid_post"]
    extra = [f"blocks.{layer}.hook_attn_out" for layer in range(n_layers)] if attn_out else []
    return points + [name for name in extra if name not in points]


def residual_view(cache: Cache, n_layers: int, *, attn_out: bool = False) -> ResidualStream:
    """The residual stream of a cache.

    Where blocks run attention and MLP in parallel there is no `hook_resid_mid`: `after_attn` is then
    `hook_resid_pre + hook_attn_out`, the residual stream as if attention alone had written to it.
    """
    points = [cache["blocks.0.hook_resid_pre"]]
    for layer in range(n_layers):
        mid = cache.get(f"blocks.{layer}.hook_resid_mid")
        points.append(points[-1] + cache[f"blocks.{layer}.hook_attn_out"] if mid is None else mid)
        points.append(cache[f"blocks.{layer}.hook_resid_post"])
    outputs = [cache[f"blocks.{layer}.hook_attn_out"] for layer in range(n_layers)] if attn_out else None
    return ResidualStream(stacked(points), None if outputs is None else stacked(outputs))


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack`, without a copy where the tensors lie at even distances in one storage, as those of one
    run do and those of one file."""
    first = tensors[0]
    offsets = [tensor.storage_offset() for tensor in tensors]
    distance = offsets[1] - offsets[0] if len(tensors) > 1 else first.numel()
    even = distance > 0 and offsets == list(range(offsets[0], offsets[0] + len(tensors) * distance, distance))
    alike = all(
        tensor.shape == first.shape
        and tensor.stride() == first.stride()
        and tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for tensor in tensors
    )
    if not (even and alike):
        return torch.stack(list(tensors))
    return first.as_strided((len(tensors), *first.shape), (distance, *first.stride()))
