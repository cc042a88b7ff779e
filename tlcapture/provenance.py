"""What is recorded of where activations come from, alike for captures and for vectors. Loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlcapture import __version__

if TYPE_CHECKING:
    from tlcapture.models import Model

RAW = "none"  # weight processing: weights as the checkpoint has them
LAYERS = "layer L is block L, counted from 0: residual_out of layer 0 is the first block's output"
HOOKS = {
    "residual_in": "blocks.{L}.hook_resid_pre",
    "after_attn": "blocks.{L}.hook_resid_mid",
    "residual_out": "blocks.{L}.hook_resid_post",
    "attn_out": "blocks.{L}.hook_attn_out",
}
COMPONENT_HOOKS = {"residual": HOOKS["residual_out"], "attn_out": HOOKS["attn_out"]}


def model_record(model: Model) -> dict[str, Any]:
    """The model and how it was run: what has to be alike for activations to be comparable."""
    return {
        "engine": model.engine,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weight_processing": RAW,
        "model_fingerprint": model.fingerprint,
        "model_revision": model.revision,
        "layer_convention": LAYERS,
        "tlcapture_version": __version__,
    }


def point_hooks(model: Model, *, attn_out: bool) -> dict[str, str]:
    """The hook of each residual point, and of `attn_out` where it is captured."""
    hooks = {point: hook for point, hook in HOOKS.items() if point != "attn_out" or attn_out}
    if model.has_parallel_blocks:
        hooks["after_attn"] = f"{HOOKS['residual_in']} + {HOOKS['attn_out']}"
    return hooks
