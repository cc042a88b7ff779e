"""The sizes of a model, which determine how large its activations are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Kinds of layers whose mixer is a recurrence or a convolution, or that have none.
WITHOUT_ATTENTION = ("linear_attention", "conv", "mamba", "recurrent", "moe", "mlp")
_NAMES_OF_D_MLP = ("intermediate_size", "ffn_dim", "n_inner")


@dataclass(frozen=True)
class Measures:
    """Numbers of layers, heads and dimensions of a model."""

    n_layers: int
    d_model: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_attention_layers: int | None = None  # `None` if all layers have attention

    @classmethod
    def of(cls, config: Any) -> Measures:
        """The sizes in a Hugging Face config, by attribute names that all architectures support."""
        text = config.get_text_config()
        d_model, n_heads = int(text.hidden_size), int(getattr(text, "num_attention_heads", None) or 1)
        n_layers, kinds = int(text.num_hidden_layers), layer_kinds(config)
        n_attention = sum(kind not in WITHOUT_ATTENTION for kind in kinds) if kinds else n_layers
        latent = getattr(text, "kv_lora_rank", None)  # latent attention has all heads in keys and values
        d_head = getattr(text, "qk_head_dim", None) if latent else getattr(text, "head_dim", None)
        wide = next(filter(None, (getattr(text, name, None) for name in _NAMES_OF_D_MLP)), 4 * d_model)
        return cls(
            n_layers=n_layers,
            d_model=d_model,
            n_heads=n_heads,
            n_key_value_heads=n_heads if latent else int(getattr(text, "num_key_value_heads", None) or n_heads),
            d_head=int(d_head or d_model // n_heads),
            d_mlp=int(wide),
            d_vocab=int(text.vocab_size),
            n_attention_layers=None if n_attention == n_layers else n_attention,
        )


def layer_kinds(config: Any) -> list[str]:
    """The kind of each layer that the Hugging Face config of a hybrid names; empty if it names none."""
    text = config.get_text_config()
    return list(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())
