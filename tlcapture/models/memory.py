"""The batch size that fits in free memory, and recognising that memory ran out.

On a device are its weights, keys and values of every running prompt, the work of one layer, and recorded activations
as far as the recorder keeps them there: it uses up to half of the free memory, and otherwise copies every step to main
memory, where the activations of every running prompt then are.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from tlcapture.errors import OutOfMemoryError
from tlcapture.models.engines.base import Model
from tlcapture.models.sizes import Measures
from tlcapture.views.hooks import HOOKS, at_any_layer, is_pattern

# Larger batches barely increase the throughput.
_MOST = {"cpu": 16}
_MOST_ELSEWHERE = 64
_SHARE = 0.5  # of free memory; the rest is for the recorder on a device, and for errors of the estimate
# While keys and values grow by half, the old and the new buffer exist. Elsewhere they are reserved for all positions.
_GROWTH = {"cpu": 2.5}
_KINDS = {name: kind for kind, name in HOOKS.items()}
# In messages of torch's allocators, and of CUDA's libraries with memory of their own (CUBLAS_STATUS_ALLOC_FAILED).
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "_status_alloc_failed")


@dataclass(frozen=True)
class BatchBytes:
    """The memory of a batch, in bytes.

    Attributes:
        reading: on the device, for each prompt of a step that reads prompts: the work of one layer, and its records.
        at_once: the number of prompts that are read in one step; `None` if all are.
        per_prompt: on the device, for each prompt: keys, values, logits, and the same for one more token.
        recorded: for each prompt, the recorded activations that have one row per token.
        patterns: for each prompt, recorded attention patterns, which are always in main memory.
    """

    reading: int
    at_once: int | None
    per_prompt: int
    recorded: int
    patterns: int

    def on_device(self, n_prompts: int) -> int:
        """The memory of a batch on the device, apart from recorded activations."""
        read = n_prompts if self.at_once is None else min(self.at_once, n_prompts)
        return read * self.reading + n_prompts * self.per_prompt

    def fits(self, n_prompts: int, device: int, main: int, *, is_main: bool) -> bool:
        """Whether a batch fits in shares of the free bytes of a device and of main memory, which may be the same."""
        on_device = self.on_device(n_prompts)
        recorded, patterns = n_prompts * self.recorded, n_prompts * self.patterns
        if is_main:
            return on_device + recorded + patterns <= _SHARE * main
        stays = recorded <= _SHARE * (device - on_device)
        return on_device <= _SHARE * device and patterns + (0 if stays else recorded) <= _SHARE * main


def fitting_batch_size(
    model: Model,
    n_tokens: int,
    n_prompts: int,
    hooks: Collection[str],
    n_prompt_tokens: int | None = None,
    *,
    in_one_step: bool = False,
    spooled_above: int | None = None,
) -> int:
    """The number of prompts of up to `n_tokens` tokens, with their responses, that fit together; at least 1.

    `n_prompt_tokens` tokens of a prompt are read at once, by default all; with `in_one_step`, all prompts together.
    Patterns of prompts with more than `spooled_above` weights are on disk.
    """
    most = min(n_prompts, _MOST.get(model.device.type, _MOST_ELSEWHERE))
    needed = batch_bytes(model, n_tokens, hooks, n_prompt_tokens, in_one_step=in_one_step, spooled_above=spooled_above)
    device, main = free_memory(model.device), free_memory(torch.device("cpu"))
    is_main = model.device.type != "cuda"
    return next((size for size in range(most, 1, -1) if needed.fits(size, device, main, is_main=is_main)), 1)


def batch_bytes(
    model: Any,
    n_tokens: int,
    hooks: Collection[str],
    n_prompt_tokens: int | None = None,
    *,
    in_one_step: bool = False,
    spooled_above: int | None = None,
) -> BatchBytes:
    """The memory of prompts, with the arguments of `fitting_batch_size`.

    Only the sizes, dtype and device of `model` and the way it reads prompts are used.
    """
    m, itemsize = model.measures, model.dtype.itemsize
    read = n_tokens if n_prompt_tokens is None else min(n_tokens, max(1, n_prompt_tokens))
    rows = [name for name in hooks if not is_pattern(name)]
    n_patterns = len(hooks) - len(rows)
    recorded = itemsize * sum(_width(name, m) for name in rows)
    # Of one layer, by token: what its attention and MLP compute, and scores, softmax (in float32) and mask by key.
    layer = itemsize * (2 * (m.n_heads + m.n_key_value_heads) * m.d_head + 3 * m.d_mlp + 4 * m.d_model)
    by_key = m.n_heads * (2 * itemsize + 4 if n_patterns or model.computes_scores else itemsize)
    by_key += n_patterns * m.n_heads * itemsize
    reading = read * (layer + recorded + by_key * read)
    at_once = None if in_one_step else model.most_prompt_positions
    keys_and_values = 2 * m.n_layers * m.n_key_value_heads * m.d_head * n_tokens * itemsize
    logits = m.d_vocab * (itemsize + 4 + 8)  # in float32 and float64 too
    decoding = layer + recorded + by_key * n_tokens + logits
    n_weights = n_patterns * m.n_heads * n_tokens * (n_tokens + 1) // 2
    is_spooled = spooled_above is not None and n_weights > spooled_above
    return BatchBytes(
        reading=reading,
        at_once=None if at_once is None else max(1, at_once // read),
        per_prompt=int(_GROWTH.get(model.device.type, 1) * keys_and_values) + decoding,
        recorded=n_tokens * recorded,
        # In pieces, step by step, and as a whole when the prompt has ended.
        patterns=0 if is_spooled else n_patterns * m.n_heads * 2 * n_tokens**2 * itemsize,
    )


def bytes_per_prompt(model: Model, n_tokens: int, hooks: Collection[str]) -> int:
    """The memory, in bytes, of one of several prompts of `n_tokens` tokens that are read in one step."""
    needed = batch_bytes(model, n_tokens, hooks, in_one_step=True)
    return needed.on_device(1) + needed.recorded + needed.patterns


def _width(name: str, m: Measures) -> int:
    """The largest number of values that an activation has for each token."""
    by_head = {"query": m.n_heads, "mixed_values": m.n_heads, "key": m.n_key_value_heads, "value": m.n_key_value_heads}
    kind = _KINDS.get(at_any_layer(name), "")
    if kind in by_head:
        return by_head[kind] * m.d_head
    return m.d_mlp if kind in ("mlp_pre", "mlp_pre_linear", "mlp_post") else m.d_model


def free_memory(device: torch.device) -> int:
    """Free bytes of a CUDA device, including torch's reserve for future tensors; otherwise of main memory."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    return int(psutil.virtual_memory().available)


@contextmanager
def within_memory(message: str) -> Iterator[None]:
    """Raise `OutOfMemoryError` with this message where an accelerator or the machine runs out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        is_known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not (is_known or any(each in text for each in _OUT_OF_MEMORY)):
            raise
        release_memory()
        raise OutOfMemoryError(message) from None


def release_memory() -> None:
    """Release memory of deleted tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
