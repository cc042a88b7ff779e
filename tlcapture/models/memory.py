"""The batch size that fits in free memory, and recognising that memory ran out."""

from __future__ import annotations

import gc
from collections.abc import Collection

import psutil
import torch

from tlcapture.models.loading import Model
from tlcapture.views.hooks import is_pattern

# Larger batches barely increase the throughput.
_MOST = {"cpu": 16}
_MOST_ELSEWHERE = 64
_SHARE = 0.5  # of free memory; the rest covers errors of the estimate


def fitting_batch_size(model: Model, n_tokens: int, n_prompts: int, hooks: Collection[str]) -> int:
    """The number of prompts of up to `n_tokens` tokens whose keys, values and activations fit; at least 1."""
    most = min(n_prompts, _MOST.get(model.device.type, _MOST_ELSEWHERE))
    fitting = int(_SHARE * free_memory(model.device) / max(1, bytes_per_prompt(model, n_tokens, hooks)))
    return max(1, min(most, fitting))


def bytes_per_prompt(model: Model, n_tokens: int, hooks: Collection[str]) -> int:
    """An upper estimate of the memory, in bytes, of one running prompt of `n_tokens` tokens."""
    n_patterns = sum(is_pattern(name) for name in hooks)
    wide = max(model.d_model, 4 * model.d_model * int(any(".mlp." in name for name in hooks)))
    captured = (len(hooks) - n_patterns) * n_tokens * wide
    patterns = n_patterns * model.n_heads * n_tokens**2
    keys_and_values = 2 * model.n_layers * n_tokens * model.n_key_value_heads * model.d_head
    # Attention scores of one layer, their mask and softmax; logits in float32 and float64.
    transient = 4 * model.n_heads * n_tokens**2 + 6 * model.d_vocab
    # Activations exist twice: in their buffer, and while they are copied there or cast to the storage dtype.
    return model.dtype.itemsize * (2 * captured + 2 * patterns + keys_and_values + transient)


def free_memory(device: torch.device) -> int:
    """Free bytes for tensors of a device, limited by main memory, where captured activations are stored."""
    main = int(psutil.virtual_memory().available)
    if device.type == "cuda":
        return min(main, int(torch.cuda.mem_get_info(device)[0]))
    return main


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that an accelerator or the machine ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def release_memory() -> None:
    """Release memory of deleted tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
