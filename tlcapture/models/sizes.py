"""The sizes of a model, which determine how large its activations are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

    @classmethod
    def of(cls, config: Any) -> Measures:
        """The sizes in a Hugging Face config, by attribute names that all architectures support."""
        text = config.get_text_config()
        d_model, n_heads = int(text.hidden_size), int(text.num_attention_heads)
        wide = next(filter(None, (getattr(text, name, None) for name in _NAMES_OF_D_MLP)), 4 * d_model)
        return cls(
            n_layers=int(text.num_hidden_layers),
            d_model=d_model,
            n_heads=n_heads,
            n_key_value_heads=int(getattr(text, "num_key_value_heads", None) or n_heads),
            d_head=int(getattr(text, "head_dim", None) or d_model // n_heads),
            d_mlp=int(wide),
            d_vocab=int(text.vocab_size),
        )
