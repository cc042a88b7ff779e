"""Reading out examples: the mean activation over a span of tokens, at every layer.

| position | span |
| --- | --- |
| `response_mean` | the response's tokens |
| `last_prompt_token` | the last token before the response |
| `all_mean` | all tokens except the first, which is an attention sink and carries nothing of the text |

`auto` is `response_mean` for an example with a response and `all_mean` for a bare text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tlcapture.errors import InputError, NumericalError, OutOfMemoryError
from tlcapture.extraction.examples import Example
from tlcapture.generation.padding import right_pad
from tlcapture.generation.typical_norms import TypicalNorms, norms_of
from tlcapture.models.checkpoints.finite_weights import remedy
from tlcapture.models.loading import Model
from tlcapture.models.memory import fitting_batch_size, within_memory
from tlcapture.prompts.tokenization import TokenizedPrompt, encode, place_response
from tlcapture.views.hooks import component_hooks

Activations = Float[Tensor, "n_layers n_examples d_model"]

POSITIONS = ("auto", "response_mean", "last_prompt_token", "all_mean")


@dataclass(frozen=True)
class Reading:
    """An example as token ids, with the span `start` to `stop` of tokens over which its mean is taken.

    `merged` and `dropped` are what the chat template merged or left out, see `RenderedChat`.
    """

    token_ids: tuple[int, ...]
    start: int
    stop: int
    position: str
    chat_template: bool = False
    merged: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def after(self, prefix: int) -> Reading:
        """The reading of the same span in the tokens after the first `prefix` ones, which it does not read."""
        rest = self.token_ids[prefix:]
        return replace(self, token_ids=rest, start=self.start - prefix, stop=self.stop - prefix)


def tokenize_example(
    tokenizer: Any,
    example: Example,
    *,
    position: str = "auto",
    chat_template: bool | None = None,
    system_prompt: str | None = None,
) -> Reading:
    """Tokenise an example as the model sees it, up to the last token that is read out.

    Raises `InputError` for a position that is unknown or that the example does not have, and where the chat template
    rejects the example.
    """
    _check_position(position, is_text=example.text is not None)
    if example.text is not None:
        ids = encode(tokenizer, example.text)
        return Reading(tuple(ids), min(1, len(ids) - 1), len(ids), "all_mean")
    assert example.prompt is not None and example.response is not None
    placed = place_response(
        tokenizer,
        example.prompt,
        example.response,
        system_prompt=system_prompt,
        chat_template=chat_template,
        separator="\n",
    )
    found = _reading(placed.token_ids, placed.start, position)
    return replace(found, chat_template=placed.chat_template, merged=placed.merged, dropped=placed.dropped)


def generated_reading(prompt: TokenizedPrompt, response_ids: Sequence[int], *, position: str = "auto") -> Reading:
    """The reading of a response that the model gave to a prompt itself; raises like `tokenize_example`."""
    _check_position(position, is_text=False)
    found = _reading((*prompt.token_ids, *response_ids), len(prompt.token_ids), position)
    return replace(found, chat_template=prompt.chat_template, merged=prompt.merged, dropped=prompt.dropped)


def _check_position(position: str, *, is_text: bool) -> None:
    if position not in POSITIONS:
        raise InputError(f"no position {position!r}: choose one of {', '.join(POSITIONS)}")
    if is_text and position not in ("auto", "all_mean"):
        raise InputError(f"--position {position}: a bare text has no response; use all_mean")


def _reading(ids: tuple[int, ...], n_prompt: int, position: str) -> Reading:
    """The reading of a response after `n_prompt` tokens."""
    if position == "last_prompt_token":
        return Reading(ids[:n_prompt], n_prompt - 1, n_prompt, position)
    start = 1 if position == "all_mean" else n_prompt
    return Reading(ids, start, len(ids), "response_mean" if position == "auto" else position)


def read_out(
    model: Model,
    readings: Sequence[Reading],
    components: Sequence[str],
    *,
    batch_size: int | None = None,
    on_examples: Callable[[int], None] = lambda count: None,
    norms: TypicalNorms | None = None,
) -> dict[str, Activations]:
    """Mean activations `[n_layers, n_examples, d_model]` in float32, by component; 0 at layers without the component.

    Examples of similar length share a forward pass, and only the means are kept. A `batch_size` of `None` takes as
    many as fit in free memory; out of memory, it is halved. `on_examples` is called with the size of each batch that
    is done. `norms` collects the norms of `residual_out` at the tokens read out.

    Raises:
        InputError: an example is longer than the model's context.
        OutOfMemoryError: an example does not fit in memory on its own.
        NumericalError: a mean is NaN or inf.
    """
    longest = max((len(reading.token_ids) for reading in readings), default=0)
    if longest > model.n_ctx:
        raise InputError(f"an example has {longest} tokens, the model's context is {model.n_ctx}")
    layers = {part: list(component_layers(model, part)) for part in components}
    names = {part: component_hooks(part, layers[part]) for part in components}
    means = {part: torch.zeros(model.n_layers, len(readings), model.d_model) for part in components}
    waiting = sorted(range(len(readings)), key=lambda number: len(readings[number].token_ids), reverse=True)
    size = batch_size or fitting_batch_size(model, longest, len(readings), _all(names), in_one_step=True)
    prefix = shared_prefix(readings) if model.can_continue_in_pieces else 0
    state = model.start(1)
    if prefix:
        tokens = torch.tensor([readings[0].token_ids[:prefix]])
        model.step(tokens, torch.ones_like(tokens), state, frozenset(), want_logits=False)
        readings = [each.after(prefix) for each in readings]
    while waiting:
        batch = waiting[:size]
        try:
            with within_memory(f"out of memory with an example of up to {longest} tokens on its own"):
                branch = model.branch(state, [0] * len(batch))
                read = _read_batch(model, branch, [readings[number] for number in batch], names, norms)
        except OutOfMemoryError:
            if size == 1:
                raise
            size = max(1, min(size, len(batch)) // 2)
            continue
        for part, values in read.items():
            means[part][torch.tensor(layers[part])[:, None], torch.tensor(batch)] = values
        waiting = waiting[size:]
        on_examples(len(batch))
    for part, values in means.items():
        if not values.isfinite().all():
            reason = remedy(model.dtype, model.name)
            raise NumericalError(f"{part} activations of the examples contain NaN or inf: {reason}")
    return means


def component_layers(model: Model, component: str) -> tuple[int, ...]:
    """The layers at which a model has a component: `attn_out` is at those with attention."""
    return model.attention_layers if component == "attn_out" else tuple(range(model.n_layers))


def shared_prefix(readings: Sequence[Reading]) -> int:
    """The number of initial tokens that all examples share and no span reads, such as the start of a chat template.

    They run once for all examples; at least one token of each example remains.
    """
    if len(readings) < 2:
        return 0
    limit = min(min(reading.start, len(reading.token_ids) - 1) for reading in readings)
    first, last = min(r.token_ids[:limit] for r in readings), max(r.token_ids[:limit] for r in readings)
    return next((number for number in range(limit) if first[number] != last[number]), limit)


def _read_batch(
    model: Model, state: Any, readings: Sequence[Reading], names: dict[str, list[str]], norms: TypicalNorms | None
) -> dict[str, Activations]:
    """The means of a batch, whose tokens follow those in `state`, by component; `names` are the hooks of each."""
    tokens, mask = right_pad([reading.token_ids for reading in readings])
    weights = _weights(readings, tokens.shape[1])
    step = model.step(tokens, mask, state, _all(names), want_logits=False)
    devices = {step.cache[name].device for by_layer in names.values() for name in by_layer}
    on = {device: weights.to(device) for device in devices}
    means = {
        part: _in_main_memory(
            [torch.einsum("bpd,bp->bd", step.cache[name].float(), on[step.cache[name].device]) for name in by_layer]
        )
        for part, by_layer in names.items()
    }
    if norms is not None and (by_layer := names.get("residual")):
        read = (weights > 0).flatten().nonzero().flatten()  # indices, for which a device need not be waited for
        at = {device: read.to(device) for device in devices}
        found = [norms_of(step.cache[name].flatten(0, 1)[at[step.cache[name].device]]) for name in by_layer]
        for layer, each in enumerate(_in_main_memory(found)):
            norms.add_norms(layer, each)
    return means


def _in_main_memory(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape, stacked; all of a device are copied at once."""
    copies = {
        device: iter(torch.stack([each for each in tensors if each.device == device]).cpu())
        for device in {each.device for each in tensors}
    }
    return torch.stack([next(copies[each.device]) for each in tensors])


def _weights(readings: Sequence[Reading], n_tokens: int) -> Float[Tensor, "batch pos"]:
    """Weights of the tokens with which their sum is the mean over the span that is read out."""
    weights = torch.zeros(len(readings), n_tokens)
    for row, reading in enumerate(readings):
        weights[row, reading.start : reading.stop] = 1 / (reading.stop - reading.start)
    return weights


def _all(names: dict[str, list[str]]) -> frozenset[str]:
    return frozenset(chain.from_iterable(names.values()))
