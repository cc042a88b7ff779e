"""Implementations of generation with activations, as users of each library would write them.

All return new token ids by prompt id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Generation
from tlcapture.generation.sampling.next_token import Sampling
from tlcapture.models.loading import Model
from tlcapture.names import PromptId
from tlcapture.prompts.chat_template import stop_ids
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.views.residual import residual_hooks, residual_view

Found = dict[PromptId, list[int]]


@dataclass(frozen=True)
class Task:
    """Prompts to continue, with the number of new tokens and the batch size; temperature 0 is greedy.

    `top_k` is that of Hugging Face, where 0 draws from the whole softmax, as tlcapture does.
    """

    prompts: Sequence[TokenizedPrompt]
    new_tokens: int
    batch_size: int
    temperature: float = 0
    top_k: int = 0


def ours(model: Model, task: Task) -> Found:
    """tlcapture: the residual stream at every point of every layer."""
    hooks = residual_hooks(model.n_layers, model.hook_names)
    found: Found = {}
    for outcome in generate(
        model,
        task.prompts,
        hooks=hooks,
        max_new_tokens=task.new_tokens,
        sampling=Sampling(task.temperature),
        batch_size=task.batch_size,
    ):
        assert isinstance(outcome, Generation)
        residual_view(outcome.cache, model.n_layers)
        found[outcome.prompt.id] = list(outcome.response_ids)
    return found


def hugging_face(reference: Any, task: Task, *, hidden_states: bool) -> Found:
    """Hugging Face `generate`, optionally with the residual stream after every layer."""

    sampled = {"do_sample": True, "temperature": task.temperature, "top_k": task.top_k}
    sampling: dict[str, Any] = sampled if task.temperature else {"do_sample": False}

    def run(tokens: Tensor, mask: Tensor) -> Tensor:
        output = reference.generate(
            tokens.to(reference.device),
            attention_mask=mask.to(reference.device),
            max_new_tokens=task.new_tokens,
            output_hidden_states=hidden_states,
            return_dict_in_generate=True,
            **sampling,
        )
        return output.sequences

    return _batches(task, run, reference.config.eos_token_id)


def nnsight(wrapped: Any, task: Task) -> Found:
    """nnsight: the output of every layer at every step."""

    def run(tokens: Tensor, mask: Tensor) -> Tensor:
        inputs = {"input_ids": tokens, "attention_mask": mask}
        with wrapped.generate(inputs, max_new_tokens=task.new_tokens, do_sample=False) as tracer:
            kept = list().save()  # type: ignore[attr-defined]  # noqa: C408  nnsight traces calls, not literals
            for _ in tracer.iter[: task.new_tokens]:
                for layer in wrapped.model.layers:
                    kept.append(layer.output)
            output = tracer.result.save()
        return output  # noqa: RET504  nnsight assigns it when the context ends

    return _batches(task, run, wrapped.config.eos_token_id)


def transformer_lens(hooked: Any, task: Task, stops: frozenset[int]) -> Found:
    """A loop of TransformerLens's `run_with_cache` with its key-value cache."""
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    names = [name for name in hooked.hook_dict if name.endswith(("hook_resid_mid", "hook_resid_post"))]
    names.append("blocks.0.hook_resid_pre")

    @torch.no_grad()
    def run(tokens: Tensor, mask: Tensor) -> Tensor:
        past = TransformerLensKeyValueCache.init_cache(hooked.cfg, "cpu", len(tokens))
        sequence, kept, step = tokens, [], tokens
        ended = torch.zeros(len(tokens), dtype=torch.bool)
        for _ in range(task.new_tokens):
            logits, cache = hooked.run_with_cache(
                step,
                names_filter=names,
                return_cache_object=False,
                attention_mask=mask if step is tokens else torch.ones_like(step),
                past_kv_cache=past,
            )
            kept.append(cache)
            step = logits[:, -1].argmax(dim=-1, keepdim=True)
            sequence = torch.cat([sequence, step], dim=1)
            ended |= torch.tensor([int(token) in stops for token in step[:, 0]])
            if ended.all():
                break
        return sequence

    return _batches(task, run, stops)


def own_stops(model: Model) -> frozenset[int]:
    """The ids of the tokens at which tlcapture stops."""
    return stop_ids(model.tokenizer, model.generation_config)


def _batches(task: Task, run: Callable[[Tensor, Tensor], Tensor], stops: int | frozenset[int] | None) -> Found:
    """Run left-padded batches in the order of the prompts; tokens after a stop token are removed."""
    ends = {stops} if isinstance(stops, int) else stops or set()
    found: Found = {}
    for start in range(0, len(task.prompts), task.batch_size):
        batch = task.prompts[start : start + task.batch_size]
        width = max(len(prompt.token_ids) for prompt in batch)
        tokens = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(batch):
            tokens[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[row, width - len(prompt.token_ids) :] = 1
        sequences = run(tokens, mask)
        for row, prompt in enumerate(batch):
            response = sequences[row, width:].tolist()
            end = next((index for index, token in enumerate(response) if token in ends), len(response))
            found[prompt.id] = response[: end + 1]
    return found
