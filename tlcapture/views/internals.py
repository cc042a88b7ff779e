"""Everything one layer computes, under TransformerLens's hook names."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor

from tlcapture.views.cache import Cache
from tlcapture.views.hooks import hook, is_pattern, layer_hooks
from tlcapture.views.kept_tokens import Positions


def internals_hooks(layer: int, hook_names: Set[str]) -> list[str]:
    """The layer's activations that the model has, in the order they are computed.

    A mixture of experts has no set of neurons: in place of `mlp.hook_pre` and `hook_post`, its input `mlp.hook_in`,
    its output `mlp.hook_out` and the router's scores `mlp.hook_router_scores` are taken.
    """
    names = [name for name in layer_hooks(layer) if name in hook_names]
    if hook("mlp_pre", layer) not in hook_names:
        return names
    return [name for name in names if name not in (hook("experts_in", layer), hook("experts_out", layer))]


def internals_view(cache: Cache, layer: int, positions: Positions | None = None) -> dict[str, Tensor]:
    """The layer's part of a cache, as copies.

    `positions` limits it to some tokens: patterns to these queries, and all other activations to these rows.

    Queries, keys and values are those before rotary embedding, `[n_tokens, n_heads, d_head]` (keys and
    values with as many heads as the model keeps; those of latent attention, as in DeepSeek-V3, are rotated and have
    all heads). Patterns are `[n_heads, n_tokens, n_tokens]`, router scores `[n_tokens, n_experts]`.
    """
    found = {name: cache[name] for name in layer_hooks(layer) if name in cache}
    if positions is None or positions.is_all:
        return {name: tensor.clone() for name, tensor in found.items()}
    rows = torch.tensor(positions.kept, dtype=torch.long)
    return {name: tensor.index_select(1 if is_pattern(name) else 0, rows) for name, tensor in found.items()}
