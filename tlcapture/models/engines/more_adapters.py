"""Adapters of TransformerBridge for architectures that TransformerLens lacks or computes differently.

They wrap models whose modules are named as those of Llama. Attention, MLP and experts stay those of transformers, so
that their values are Hugging Face's; hooks are around them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

# Architectures of which TransformerLens 3 normalises queries and keys before it rotates them, rather than after.
_COMPUTED_OTHERWISE_IN_3 = ("HunYuanDenseV1ForCausalLM",)
# Architectures of which TransformerLens 3 rotates halves of queries and keys, rather than neighbours.
_ROTATED_OTHERWISE_IN_3 = ("CohereForCausalLM", "Cohere2ForCausalLM")
_LIKE_LLAMA = (
    "CwmForCausalLM",
    "DiffLlamaForCausalLM",
    "Dots1ForCausalLM",
    "HeliumForCausalLM",
    "HunYuanMoEV1ForCausalLM",
    "MinistralForCausalLM",
)
# Names under which transformers saves architectures that TransformerLens has an adapter for.
_ALSO_NAMED = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}


@cache
def register_adapters() -> None:
    """Add the adapters to TransformerLens's own, unless it has one for the architecture."""
    from transformer_lens.factories.architecture_adapter_factory import (
        SUPPORTED_ARCHITECTURES,
        ArchitectureAdapterFactory,
    )

    from tlcapture.models.engines.hooked import has_hooked_transformer

    like_llama = _adapter()
    found = dict.fromkeys(_LIKE_LLAMA, like_llama)
    found |= {name: SUPPORTED_ARCHITECTURES[known] for name, known in _ALSO_NAMED.items()}
    found = {name: adapter for name, adapter in found.items() if name not in SUPPORTED_ARCHITECTURES}
    if has_hooked_transformer():
        found |= dict.fromkeys(_COMPUTED_OTHERWISE_IN_3, like_llama)
        found |= {name: _with_own_attention(SUPPORTED_ARCHITECTURES[name]) for name in _ROTATED_OTHERWISE_IN_3}
    for name, adapter in found.items():
        SUPPORTED_ARCHITECTURES[name] = adapter
        ArchitectureAdapterFactory.register_adapter(name, adapter)


def _with_own_attention(adapter: type[Any]) -> type[Any]:
    """An adapter whose attention is computed by transformers."""

    class WithOwnAttention(adapter):
        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            self.component_mapping["blocks"].submodules["attn"] = _own_attention(self.cfg)

    return WithOwnAttention


def _own_attention(cfg: Any) -> Any:
    from transformer_lens.model_bridge.generalized_components import AttentionBridge, LinearBridge

    return AttentionBridge(
        name="self_attn",
        config=cfg,
        submodules={key: LinearBridge(name=f"{key}_proj") for key in "qkvo"},
        maintain_native_attention=True,
        requires_attention_mask=True,
    )


def _adapter() -> type[Any]:
    from transformer_lens.model_bridge import generalized_components as components
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

    class LikeLlamaAdapter(ArchitectureAdapter):
        """Modules named as those of Llama, each computed by transformers."""

        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            self._set_rms_rotary_defaults()
            self.supports_fold_ln = False
            self.weight_processing_conversions: dict[str, Any] = {}
            # A block of experts has none of these projections, unlike a dense one.
            mlp = components.MoEBridge(
                name="mlp",
                config=self.cfg,
                submodules={
                    "dense_gate": components.LinearBridge(name="gate_proj", optional=True),
                    "dense_in": components.LinearBridge(name="up_proj", optional=True),
                    "dense_out": components.LinearBridge(name="down_proj", optional=True),
                },
            )
            blocks = {
                "ln1": components.RMSNormalizationBridge(name="input_layernorm", config=self.cfg),
                "ln2": components.RMSNormalizationBridge(name="post_attention_layernorm", config=self.cfg),
                "attn": _own_attention(self.cfg),
                "mlp": mlp,
            }
            self.component_mapping = {
                "embed": components.EmbeddingBridge(name="model.embed_tokens"),
                "blocks": components.BlockBridge(name="model.layers", submodules=blocks),
                "ln_final": components.RMSNormalizationBridge(name="model.norm", config=self.cfg),
                "unembed": components.UnembeddingBridge(name="lm_head", config=self.cfg),
            }

    return LikeLlamaAdapter
