"""Attention patterns: the weights with which each token attends to earlier ones, by layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlcapture.names import PromptId
from tlcapture.shapes import Patterns
from tlcapture.storage.rounding import WEIGHT_DIGITS, rounded_for_json
from tlcapture.views.cache import Cache, stacked
from tlcapture.views.hooks import hook


@dataclass(frozen=True, repr=False)
class AttentionPatterns:
    """Weights `[n_layers, n_heads, query, key]`, each query's row summing to 1 over keys up to itself."""

    patterns: Patterns

    def __repr__(self) -> str:
        n_layers, n_heads, n_tokens, _ = self.patterns.shape
        return f"AttentionPatterns({n_layers} layers, {n_heads} heads, {n_tokens} tokens)"

    def to_json(
        self, *, prompt_id: PromptId, prompt_set: str, tokens: Sequence[str], n_prompt_tokens: int
    ) -> dict[str, Any]:
        """The content of `{id}_attention.json`; weights have 4 significant digits."""
        n_layers, n_heads, n_tokens, _ = self.patterns.shape
        return {
            "prompt_id": prompt_id,
            "prompt_set": prompt_set,
            "n_layers": n_layers,
            "n_heads": n_heads,
            "tokens": list(tokens),
            "n_prompt_tokens": n_prompt_tokens,
            "n_response_tokens": n_tokens - n_prompt_tokens,
            "attention": [
                {"token_idx": token, "context_size": token + 1, "by_layer": _rows(self.patterns, token)}
                for token in range(n_tokens)
            ],
        }


def _rows(patterns: Patterns, token: int) -> NDArray[np.float32]:
    """One token's weights `[n_layers, n_heads, token + 1]`, rounded."""
    return rounded_for_json(patterns[:, :, token, : token + 1].float().numpy(), WEIGHT_DIGITS)


def attention_hooks(n_layers: int) -> list[str]:
    """The activations the view reads."""
    return [hook("pattern", layer) for layer in range(n_layers)]


def attention_view(cache: Cache, n_layers: int) -> AttentionPatterns:
    """The patterns of all layers of a cache."""
    return AttentionPatterns(stacked([cache[name] for name in attention_hooks(n_layers)]))
