"""What Hugging Face's own model of a checkpoint computes, as the oracle of `tlcapture doctor`.

The reference is run and dropped before the model under test is loaded: one model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tlcapture.checkpoints import cast, fetch_weights, quiet_loading, source_of

NEW_TOKENS = 3


@dataclass(frozen=True)
class ReferenceRun:
    """A prompt and its greedy continuation through Hugging Face, in float32 on the CPU.

    `hidden[layer]` is what enters a layer; `patterns` is `None` for an architecture that hands none out.
    """

    token_ids: tuple[int, ...]
    n_prompt_tokens: int
    hidden: Float[Tensor, "n_layers n_tokens d_model"]
    logits: Float[Tensor, "n_tokens d_vocab"]
    patterns: Float[Tensor, "n_layers n_heads n_tokens n_tokens"] | None


@torch.no_grad()
def reference_run(hf_model: Any, prompt_ids: Sequence[int], new_tokens: int = NEW_TOKENS) -> ReferenceRun:
    """Run whole sequences, without a cache of keys and values, one token longer each time."""
    ids = list(prompt_ids)
    for _ in range(new_tokens):
        logits = hf_model(_batch_of_one(hf_model, ids), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    out = hf_model(_batch_of_one(hf_model, ids), use_cache=False, output_hidden_states=True, output_attentions=True)
    patterns = [pattern for pattern in out.attentions or () if pattern is not None]
    complete = len(patterns) == len(out.hidden_states) - 1
    return ReferenceRun(
        tuple(ids),
        len(prompt_ids),
        torch.stack([state[0].float().cpu() for state in out.hidden_states[:-1]]),
        out.logits[0].float().cpu(),
        torch.stack([pattern[0].float().cpu() for pattern in patterns]) if complete else None,
    )


def load_reference(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The checkpoint as transformers alone loads it. Raises `ModelError` where it cannot."""
    with quiet_loading():
        model = fetch_weights(name, source_of(name))
    cast(model, dtype)
    return model.eval().requires_grad_(False).to(device)


def _batch_of_one(hf_model: Any, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)], device=next(hf_model.parameters()).device)
