"""The hook table: which TransformerLens hook holds which activation, by layer. Loads no torch.

hook("residual_out", 12)       # "blocks.12.hook_resid_post"
hook("pattern", 12)            # "blocks.12.attn.hook_pattern"
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from functools import cache

from tlcapture.errors import InputError

POINTS = ("residual_in", "after_attn", "residual_out")  # the residual points of a layer, in the order they are computed
COMPONENTS = ("residual", "attn_out")  # the activations that vectors are extracted from and captures projected at
# What a layer computes, in that order.
HOOKS = {
    "residual_in": "blocks.{L}.hook_resid_pre",
    "query": "blocks.{L}.attn.hook_q",
    "key": "blocks.{L}.attn.hook_k",
    "value": "blocks.{L}.attn.hook_v",
    "pattern": "blocks.{L}.attn.hook_pattern",
    "mixed_values": "blocks.{L}.attn.hook_z",
    "attn_out": "blocks.{L}.hook_attn_out",
    "mixer_out": "blocks.{L}.hook_mixer_out",
    "after_attn": "blocks.{L}.hook_resid_mid",
    "mlp_pre": "blocks.{L}.mlp.hook_pre",
    "mlp_pre_linear": "blocks.{L}.mlp.hook_pre_linear",
    "mlp_post": "blocks.{L}.mlp.hook_post",
    "experts_in": "blocks.{L}.mlp.hook_in",
    "router_scores": "blocks.{L}.mlp.hook_router_scores",
    "experts_out": "blocks.{L}.mlp.hook_out",
    "mlp_out": "blocks.{L}.hook_mlp_out",
    "residual_out": "blocks.{L}.hook_resid_post",
}
COMPONENT_HOOKS = {"residual": HOOKS["residual_out"], "attn_out": HOOKS["attn_out"]}


def hook(name: str, layer: int) -> str:
    """TransformerLens's name of an activation in `HOOKS` at a layer."""
    return HOOKS[name].format(L=layer)


def point_named(name: str) -> str:
    """Our name of a point for TransformerLens's: `residual_out` for `resid_post` and `hook_resid_post`."""
    theirs = {HOOKS[each].rpartition(".hook_")[2]: each for each in (*POINTS, "attn_out")}
    return theirs.get(name.removeprefix("hook_"), name)


def layer_hooks(layer: int) -> list[str]:
    """Every hook in the table at a layer, in the order a layer computes them."""
    return [hook(name, layer) for name in HOOKS]


def attention_layers(n_layers: int, hook_names: Set[str]) -> tuple[int, ...]:
    """The layers with attention: all, except in hybrids those whose mixer is recurrent or a convolution."""
    return tuple(layer for layer in range(n_layers) if hook("pattern", layer) in hook_names)


def mixer_hook(layer: int, hook_names: Set[str]) -> str:
    """The hook of the contribution of a layer's attention or other mixer to the residual stream."""
    return next(name for kind in ("attn_out", "mixer_out") if (name := hook(kind, layer)) in hook_names)


def component_hooks(component: str, layers: Iterable[int]) -> list[str]:
    """The hooks of a component at some layers."""
    return [COMPONENT_HOOKS[component].format(L=layer) for layer in layers]


def check_component(component: str) -> str:
    """Return `component`, or raise `InputError` for a name that is not in `COMPONENTS`."""
    if component not in COMPONENTS:
        raise InputError(f"no component {component!r}: choose one of {', '.join(COMPONENTS)}")
    return component


@cache
def at_any_layer(name: str) -> str:
    """Turn `blocks.12.hook_x`, `blocks.L.hook_x` or `blocks.{layer}.hook_x` into the table's `blocks.{L}.hook_x`."""
    return re.sub(r"^blocks\.(\{\w+\}|\w+)\.", "blocks.{L}.", name)


def is_pattern(name: str) -> bool:
    """Whether a hook holds attention patterns, `[batch, head, pos, key]`, rather than one row per token."""
    return name.endswith(HOOKS["pattern"].removeprefix("blocks.{L}"))
