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
from tlcapture.errors import InputError, NumericalError
from tlcapture.extraction.examples import Example
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
    batch_size: int = 16,
    on_examples: Callable[[int], None] = lambda count: None,
) -> dict[str, Activations]:
    """Mean activations `[n_layers, n_examples, d_model]` in float32, by component.

    One forward pass over batches of like length; only the means are kept.
    """
    too_long = next((reading for reading in readings if len(reading.token_ids) > model.n_ctx), None)
    if too_long is not None:
        raise InputError(f"an example has {len(too_long.token_ids)} tokens, the model's context is {model.n_ctx}")
    names = {part: [HOOKS[part].format(layer=layer) for layer in range(model.n_layers)] for part in components}
    means = {part: torch.zeros(model.n_layers, len(readings), model.d_model) for part in components}
    order = sorted(range(len(readings)), key=lambda number: len(readings[number].token_ids), reverse=True)
    hooks = frozenset(name for part in components for name in names[part])
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        tokens, mask, weights = _pad([readings[number] for number in batch])
        step = model.step(tokens, mask, model.start(len(batch)), hooks, want_logits=False)
        for part in components:
            for layer, name in enumerate(names[part]):
                activation = step.cache[name].float()
                mean = torch.einsum("bpd,bp->bd", activation, weights.to(activation.device))
                means[part][layer, batch] = mean.cpu()
        on_examples(len(batch))
    for part, values in means.items():
        if not values.isfinite().all():
            raise NumericalError(f"{part} activations of the examples hold NaN or inf: try --dtype float32")
    return means


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
