"""The hook table: which TransformerLens hook holds what, by layer. Loads no torch.

hook("residual_out", 12)       # "blocks.12.hook_resid_post"
hook("pattern", 12)            # "blocks.12.attn.hook_pattern"
"""

from __future__ import annotations

POINTS = ("residual_in", "after_attn", "residual_out")  # the residual points of a layer, in the order they are computed
COMPONENTS = ("residual", "attn_out")  # the activations that vectors are made from, and captures projected onto
HOOKS = {
    "residual_in": "blocks.{L}.hook_resid_pre",
    "after_attn": "blocks.{L}.hook_resid_mid",
    "residual_out": "blocks.{L}.hook_resid_post",
    "attn_out": "blocks.{L}.hook_attn_out",
    "pattern": "blocks.{L}.attn.hook_pattern",
}
COMPONENT_HOOKS = {"residual": HOOKS["residual_out"], "attn_out": HOOKS["attn_out"]}


def hook(name: str, layer: int) -> str:
    """The hook of a layer's residual point, attention output or pattern, as TransformerLens names it."""
    return HOOKS[name].format(L=layer)


def component_hooks(component: str, n_layers: int) -> list[str]:
    """The hooks of a component at all layers."""
    return [COMPONENT_HOOKS[component].format(L=layer) for layer in range(n_layers)]


def is_pattern(name: str) -> bool:
    """Whether a hook holds attention patterns, `[batch, head, pos, key]`, and not one row per token."""
    return name.endswith("hook_pattern")
