"""Everything one layer computes, under TransformerLens's hook names."""

from __future__ import annotations

from collections.abc import Set

from torch import Tensor

from tlcapture.views.cache import Cache
from tlcapture.views.hooks import layer_hooks


def internals_hooks(layer: int, hook_names: Set[str]) -> list[str]:
    """The layer's activations that the model has, in the order they are computed."""
    return [name for name in layer_hooks(layer) if name in hook_names]


def internals_view(cache: Cache, layer: int) -> dict[str, Tensor]:
    """The layer's part of a cache, each tensor in memory of its own.

    Queries, keys and values are those before rotary embedding, `[n_tokens, n_heads, d_head]` (keys and
    values with as many heads as the model keeps); patterns are `[n_heads, n_tokens, n_tokens]`.
    """
    return {name: cache[name].clone() for name in layer_hooks(layer) if name in cache}
