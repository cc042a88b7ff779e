"""Everything one layer computes, under TransformerLens's own names."""

from __future__ import annotations

from collections.abc import Set

from torch import Tensor

from tlcapture.views.cache import Cache

_NAMES = (
    "hook_resid_pre",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_pattern",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)


def internals_hooks(layer: int, hook_names: Set[str]) -> list[str]:
    """The layer's activations that the model has, in the order they are computed."""
    return [name for suffix in _NAMES if (name := f"blocks.{layer}.{suffix}") in hook_names]


def internals_view(cache: Cache, layer: int) -> dict[str, Tensor]:
    """The layer's part of a cache, each tensor in memory of its own.

    Queries, keys and values are those before rotary embedding, `[n_tokens, n_heads, d_head]` (keys and
    values with as many heads as the model keeps); patterns are `[n_heads, n_tokens, n_tokens]`.
    """
    prefix = f"blocks.{layer}."
    return {name: cache[name].clone() for suffix in _NAMES if (name := prefix + suffix) in cache}
