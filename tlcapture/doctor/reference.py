"""The reference of `tlcapture doctor`: the activations that Hugging Face's own model computes from a checkpoint.

It is run and released before the model under test is loaded, so that only one model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tlcapture.errors import OutOfMemoryError
from tlcapture.models.checkpoints.checkpoint import cast, fetch_weights, quiet_loading
from tlcapture.models.checkpoints.sources import source_of
from tlcapture.models.deviation import deviation
from tlcapture.models.layer_inputs import layer_inputs
from tlcapture.models.memory import within_memory

_NEW_TOKENS = 3


@dataclass(frozen=True, eq=False)
class ReferenceRun:
    """A prompt and its greedy continuation through Hugging Face, in float32 on the CPU.

    `hidden[layer]` is the input of a layer; `patterns` are those of the layers with attention, `None` for an
    architecture that does not return them. `rounding` holds the deviations of Hugging Face's own run in 16 bits from
    `hidden`, and last from `logits`, `pattern_rounding` that from `patterns`; `None` if the checkpoint was run in
    float32, or if float32 did not fit in memory.
    """

    token_ids: tuple[int, ...]
    n_prompt_tokens: int
    hidden: Float[Tensor, "n_layers n_tokens d_model"]
    logits: Float[Tensor, "n_tokens d_vocab"]
    patterns: Float[Tensor, "n_attention_layers n_heads n_tokens n_tokens"] | None
    rounding: tuple[float, ...] | None = None
    pattern_rounding: float | None = None


def reference_runs(hf_model: Any, prompts: Sequence[Sequence[int]]) -> list[ReferenceRun]:
    """Runs of prompts in float32, with the deviations from them of a model in 16 bits.

    The model is in float32 afterwards, if that fits in memory; otherwise the runs in 16 bits are returned.
    """
    runs = [reference_run(hf_model, ids) for ids in prompts]
    if next(hf_model.parameters()).dtype == torch.float32:
        return runs
    try:
        with within_memory("out of memory in float32"):
            cast(hf_model, torch.float32)
            return [_exact(hf_model, run) for run in runs]
    except OutOfMemoryError:
        return runs


@torch.no_grad()
def reference_run(hf_model: Any, prompt_ids: Sequence[int]) -> ReferenceRun:
    """Run a prompt and its greedy continuation without a cache of keys and values: the whole sequence at every step."""
    ids = list(prompt_ids)
    for _ in range(_NEW_TOKENS):
        ids.append(int(hf_model(_batch_of_one(hf_model, ids), use_cache=False).logits[0, -1].argmax()))
    return _whole(hf_model, ids, len(prompt_ids))


@torch.no_grad()
def _whole(hf_model: Any, ids: Sequence[int], n_prompt_tokens: int) -> ReferenceRun:
    with layer_inputs(hf_model) as inputs:
        out = hf_model(_batch_of_one(hf_model, ids), use_cache=False, output_hidden_states=True, output_attentions=True)
    # Models without attention return no attentions, and outputs of layers rather than inputs as hidden states.
    hidden = inputs if len(inputs) == len(out.hidden_states) - 1 else out.hidden_states[:-1]
    patterns = [each for each in getattr(out, "attentions", None) or () if each is not None and each.ndim == 4]
    return ReferenceRun(
        tuple(ids),
        n_prompt_tokens,
        torch.stack([state[0].float().cpu() for state in hidden]),
        out.logits[0].float().cpu(),
        torch.stack([pattern[0].float().cpu() for pattern in patterns]) if patterns else None,
    )


def _exact(hf_model: Any, run: ReferenceRun) -> ReferenceRun:
    exact = _whole(hf_model, run.token_ids, run.n_prompt_tokens)
    rounding = [deviation(one, other) for one, other in zip(run.hidden, exact.hidden, strict=True)]
    patterns = None if run.patterns is None or exact.patterns is None else deviation(run.patterns, exact.patterns)
    return replace(exact, rounding=(*rounding, deviation(run.logits, exact.logits)), pattern_rounding=patterns)


def load_reference(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The checkpoint as loaded by transformers alone. Raises `ModelError` if it cannot be loaded."""
    with quiet_loading():
        model = fetch_weights(name, source_of(name))
    cast(model, dtype)
    return model.eval().requires_grad_(False).to(device)


def _batch_of_one(hf_model: Any, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)], device=next(hf_model.parameters()).device)
