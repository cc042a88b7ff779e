"""The residual stream at every point of every layer.

Residual points, in the order they are computed, share one buffer: `residual_in` of layer 0, then for
each layer `after_attn` and `residual_out`. `residual_in` of a later layer is `residual_out` of the layer
before and is not stored twice. The buffer of a capture that keeps only some layers or points holds only those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tlcapture.errors import InputError
from tlcapture.shapes import LayerOutputs, Residual, ResidualPoints
from tlcapture.text import dtype_name, layers_named
from tlcapture.views.cache import Cache, stacked
from tlcapture.views.hooks import COMPONENTS, attention_layers, hook, mixer_hook
from tlcapture.views.kept_points import KeptPoints

# Raises `StorageError` if any of the rows of a buffer, given with its name, is not what was written to its file.
CheckRows = Callable[[str, Tensor, Iterable[int]], None]


@dataclass(frozen=True, eq=False, repr=False)
class ResidualStream:
    """The residual stream of some tokens, and the attention outputs if they were captured.

    `points` is `[2 * n_layers + 1, n_tokens, d_model]`, `attn_out` `[n_layers, n_tokens, d_model]`. If `only`
    states the kept points, they are `[len(only.point_indices), ...]` and `[len(only.layers), ...]`; if
    `with_attention` names the layers that have attention, `attn_out` holds only the kept ones among them.
    `check` is called before rows of a file are read; whole buffers are read from `checked()`.
    """

    points: ResidualPoints
    attn_out: LayerOutputs | None = None
    only: KeptPoints | None = None
    with_attention: tuple[int, ...] | None = None
    check: CheckRows | None = None

    def __repr__(self) -> str:
        dtype = dtype_name(self.points.dtype)
        attn_out = ", with attn_out" if self.attn_out is not None else ""
        return (
            f"ResidualStream({self.n_layers} layers, {self.n_tokens} tokens, d_model {self.points.shape[-1]}, "
            f"{dtype}{attn_out})"
        )

    @property
    def n_layers(self) -> int:
        """Layers of the model, whether kept or not."""
        return (self.points.shape[0] - 1) // 2 if self.only is None else self.only.n_layers

    @cached_property
    def kept(self) -> KeptPoints:
        """Which layers and points the buffers hold."""
        return KeptPoints.of(self.n_layers) if self.only is None else self.only

    @property
    def output_layers(self) -> tuple[int, ...]:
        """The kept layers that have attention: the rows of `attn_out`."""
        return layers_with_attention(self.kept, self.with_attention)

    @property
    def components(self) -> tuple[str, ...]:
        """The components that can be projected: `residual`, and `attn_out` if it was captured."""
        return ("residual",) if self.attn_out is None else COMPONENTS

    @property
    def n_tokens(self) -> int:
        """Tokens whose activations are held."""
        return int(self.points.shape[1])

    def at(self, layer: int, point: str) -> Residual:
        """The activations `[n_tokens, d_model]` of a layer at a residual point, or its `attn_out`.

        Raises `InputError` for a layer or point that is not kept, and for `attn_out` of a layer without attention,
        naming the ones that are kept.
        """
        if point == "attn_out":
            layer = self.kept.check_layer(layer)
            if self.attn_out is None:
                raise InputError("attn_out was not captured: capture again with --capture-attn")
            if layer not in self.output_layers:
                raise InputError(f"layer {layer} has no attention: attn_out has {layers_named(self.output_layers)}")
            return self._row("attn_out", self.attn_out, self.output_layers.index(layer))
        return self._row("points", self.points, self.kept.row(layer, point))

    def checked(self) -> ResidualStream:
        """The stream, after comparing both buffers with their checksums; raises `StorageError` if one has changed."""
        if self.check is None:
            return self
        for name, buffer in (("points", self.points), ("attn_out", self.attn_out)):
            if buffer is not None:
                self.check(name, buffer, range(buffer.shape[0]))
        return replace(self, check=None)

    def _row(self, name: str, buffer: Tensor, row: int) -> Tensor:
        if self.check is not None:
            self.check(name, buffer, [row])
        return buffer[row]

    def tokens(self, start: int, stop: int, dtype: torch.dtype) -> ResidualStream:
        """A copy of the tokens `start` to `stop` in a dtype."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor[:, start:stop].to(dtype, copy=True, memory_format=torch.contiguous_format)

        whole = self.checked()
        outputs = None if whole.attn_out is None else copy(whole.attn_out)
        return replace(whole, points=copy(whole.points), attn_out=outputs)

    def select(self, rows: Sequence[int]) -> ResidualStream:
        """A copy of some of the tokens."""
        index, whole = torch.tensor(list(rows), dtype=torch.long), self.checked()
        outputs = None if whole.attn_out is None else whole.attn_out[:, index]
        return replace(whole, points=whole.points[:, index], attn_out=outputs)


def layers_with_attention(kept: KeptPoints, with_attention: Sequence[int] | None) -> tuple[int, ...]:
    """The kept layers that have attention; `with_attention` is `None` if all have it."""
    return kept.layers if with_attention is None else tuple(n for n in kept.layers if n in with_attention)


def residual_hooks(
    n_layers: int, hook_names: Set[str], *, attn_out: bool = False, only: KeptPoints | None = None
) -> list[str]:
    """The activations the view reads, the residual points first and in the buffer's order.

    Raises `InputError` if `attn_out` is requested but none of the layers has attention.
    """
    kept = KeptPoints.of(n_layers) if only is None else only
    points, before = [], []
    for point in kept.point_indices:
        layer, is_after_attn = divmod(point, 2)
        if is_after_attn and hook("after_attn", layer) not in hook_names:
            # Parallel blocks never compute a residual between attention and MLP.
            points.append(mixer_hook(layer, hook_names))
            before.append(_between_layers(layer))
        else:
            points.append(hook("after_attn", layer) if is_after_attn else _between_layers(layer))
    outputs = layers_with_attention(kept, attention_layers(n_layers, hook_names)) if attn_out else ()
    if attn_out and not outputs:
        raise InputError("no layer that is kept has attention, so there is no attn_out: leave out --capture-attn")
    extra = [hook("attn_out", layer) for layer in outputs]
    return list(dict.fromkeys([*points, *before, *extra]))


def residual_view(
    cache: Cache,
    n_layers: int,
    *,
    attn_out: bool = False,
    only: KeptPoints | None = None,
    with_attention: tuple[int, ...] | None = None,
) -> ResidualStream:
    """The residual stream of a cache: all of it, or the part that `only` keeps.

    Blocks that run attention and MLP in parallel have no `hook_resid_mid`: `after_attn` is then
    `hook_resid_pre + hook_attn_out`, the residual stream as if attention alone had written to it. In layers whose
    mixer is not attention, `after_attn` is `residual_in` plus the mixer's output, and there is no `attn_out`.

    Args:
        with_attention: the layers that have attention; `None` if all have it.
    """
    kept = KeptPoints.of(n_layers) if only is None else only
    points = [_at_point(cache, point) for point in kept.point_indices]
    layers = layers_with_attention(kept, with_attention)
    outputs = stacked([cache[hook("attn_out", layer)] for layer in layers]) if attn_out and layers else None
    return ResidualStream(stacked(points), outputs, only, with_attention)


def _between_layers(layer: int) -> str:
    """The hook of a layer's input, which is the output of the layer before."""
    return hook("residual_out", layer - 1) if layer else hook("residual_in", 0)


def _at_point(cache: Cache, point: int) -> Tensor:
    layer, is_after_attn = divmod(point, 2)
    if not is_after_attn:
        return cache[_between_layers(layer)]
    mid = cache.get(hook("after_attn", layer))
    return cache[_between_layers(layer)] + cache[mixer_hook(layer, cache.keys())] if mid is None else mid
