"""How many prompts fit in free memory together."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from tlcapture.chat import TokenizedPrompt
from tlcapture.models import Model

# Beyond these a larger batch no longer raises the throughput noticeably.
_MOST = {"cpu": 16}
_MOST_ELSEWHERE = 64
_SHARE = 0.5  # of free memory; the rest is for what cannot be foreseen


def fitting_batch_size(
    model: Model, prompts: Sequence[TokenizedPrompt], hooks: Sequence[str], max_new_tokens: int
) -> int:
    """The largest batch of the longest prompts whose keys, values and activations fit, at least 1."""
    if not prompts:
        return 1
    n_tokens = max(len(prompt.token_ids) for prompt in prompts) + max_new_tokens
    most = _MOST.get(model.device.type, _MOST_ELSEWHERE)
    fitting = int(_SHARE * free_memory(model.device) / bytes_per_prompt(model, n_tokens, hooks))
    return max(1, min(most, fitting, len(prompts)))


def bytes_per_prompt(model: Model, n_tokens: int, hooks: Sequence[str]) -> int:
    """An upper estimate of what one prompt of `n_tokens` takes while it runs."""
    n_patterns = sum(name.endswith("hook_pattern") for name in hooks)
    wide = max(model.d_model, 4 * model.d_model * int(any(".mlp." in name for name in hooks)))
    captured = (len(hooks) - n_patterns) * n_tokens * wide
    patterns = n_patterns * model.n_heads * n_tokens**2
    keys_and_values = 2 * model.n_layers * n_tokens * model.n_key_value_heads * model.d_head
    # Attention scores of one layer, their mask and softmax; logits in float32 and float64.
    transient = 4 * model.n_heads * n_tokens**2 + 6 * model.d_vocab
    # Captured twice over: the steps, and one prompt's assembled line.
    return model.dtype.itemsize * (2 * captured + 2 * patterns + keys_and_values + transient)


def free_memory(device: torch.device) -> int:
    """Free bytes for tensors of a device; what is captured lies in main memory as well."""
    main = int(psutil.virtual_memory().available)
    if device.type == "cuda":
        return min(main, int(torch.cuda.mem_get_info(device)[0]))
    return main
