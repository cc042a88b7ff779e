"""What is read out of an example: the mean activation of its tokens, at every layer.

Of a prompt-response example the mean runs over the response's tokens, of a bare text over all tokens
but the BOS, whose activations are an attention sink's and say nothing of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tlcapture.chat import render_chat, uses_chat_template, with_bos
from tlcapture.errors import InputError, NumericalError, OutOfMemoryError
from tlcapture.extraction.examples import Example
from tlcapture.memory import fitting_batch_size, is_out_of_memory, release_memory
from tlcapture.models import Model

HOOKS = {"residual": "blocks.{layer}.hook_resid_post", "attn_out": "blocks.{layer}.hook_attn_out"}

Activations = Float[Tensor, "n_layers n_examples d_model"]


@dataclass(frozen=True)
class Reading:
    """An example as token ids, and from which token on its mean runs."""

    token_ids: tuple[int, ...]
    start: int
    position: str


def tokenize_example(
    tokenizer: Any, example: Example, *, chat_template: bool | None = None, system_prompt: str | None = None
) -> Reading:
    """Token ids of an example as the model would see it, up to the response's last token."""
    if example.text is not None:
        ids = with_bos(tokenizer, tokenizer(example.text)["input_ids"])
        start = 1 if ids[:1] == [tokenizer.bos_token_id] and len(ids) > 1 else 0
        return Reading(tuple(ids), start, "all_tokens_mean")
    assert example.prompt is not None and example.response is not None
    if uses_chat_template(tokenizer, chat_template):
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        rendered = render_chat(tokenizer, [*system, {"role": "user", "content": example.prompt}])
        prompt = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    else:
        prompt = with_bos(tokenizer, tokenizer(example.prompt + "\n")["input_ids"])
    response = tokenizer(example.response, add_special_tokens=False)["input_ids"]
    return Reading((*prompt, *response), len(prompt), "response_mean")


def read_out(
    model: Model,
    readings: Sequence[Reading],
    components: Sequence[str],
    *,
    batch_size: int | None = None,
    on_examples: Callable[[int], None] = lambda count: None,
) -> dict[str, Activations]:
    """Mean activations `[n_layers, n_examples, d_model]` in float32, by component.

    One forward pass over batches of like length; only the means are kept. `batch_size` `None` takes
    what fits in free memory; out of memory, it is halved.
    """
    longest = max((len(reading.token_ids) for reading in readings), default=0)
    if longest > model.n_ctx:
        raise InputError(f"an example has {longest} tokens, the model's context is {model.n_ctx}")
    names = {part: [HOOKS[part].format(layer=layer) for layer in range(model.n_layers)] for part in components}
    hooks = frozenset(name for part in components for name in names[part])
    means = {part: torch.zeros(model.n_layers, len(readings), model.d_model) for part in components}
    waiting = sorted(range(len(readings)), key=lambda number: len(readings[number].token_ids), reverse=True)
    size = batch_size or fitting_batch_size(model, longest, len(readings), hooks)
    while waiting:
        batch = waiting[:size]
        try:
            read = _read_batch(model, [readings[number] for number in batch], names, hooks)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise OutOfMemoryError(
                    f"out of memory with an example of {longest} tokens, alone in its batch"
                ) from None
            size = max(1, min(size, len(batch)) // 2)
            release_memory()
            continue
        for part, values in read.items():
            means[part][:, batch] = values
        waiting = waiting[size:]
        on_examples(len(batch))
    for part, values in means.items():
        if not values.isfinite().all():
            raise NumericalError(f"{part} activations of the examples hold NaN or inf: try --dtype float32")
    return means


def _read_batch(
    model: Model, readings: Sequence[Reading], names: dict[str, list[str]], hooks: frozenset[str]
) -> dict[str, Activations]:
    tokens, mask, weights = _pad(readings)
    step = model.step(tokens, mask, model.start(len(readings)), hooks, want_logits=False)
    return {
        part: torch.stack(
            [
                torch.einsum("bpd,bp->bd", step.cache[name].float(), weights.to(step.cache[name].device)).cpu()
                for name in by_layer
            ]
        )
        for part, by_layer in names.items()
    }


def _pad(readings: Sequence[Reading]) -> tuple[Tensor, Tensor, Float[Tensor, "batch pos"]]:
    """Left-padded ids, their mask, and weights whose sum over the tokens read out is 1."""
    width = max(len(reading.token_ids) for reading in readings)
    tokens = torch.zeros(len(readings), width, dtype=torch.long)
    mask, weights = torch.zeros_like(tokens), torch.zeros(len(readings), width)
    for row, reading in enumerate(readings):
        length = len(reading.token_ids)
        tokens[row, width - length :] = torch.tensor(reading.token_ids)
        mask[row, width - length :] = 1
        weights[row, width - length + reading.start :] = 1 / (length - reading.start)
    return tokens, mask, weights
