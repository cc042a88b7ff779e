"""Promise 1: every activation equals Hugging Face's at that point, on every architecture and engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tlcapture.chat import TokenizedPrompt
from tlcapture.generation import Generation, Sampling, generate, teacher_force
from tlcapture.models import Model
from tlcapture.views.attention import attention_hooks
from tlcapture.views.residual import residual_hooks, residual_view

ENGINES = ("hooked", "plain", "bridge")
LONGER_THAN_ANY_WINDOW = 40


@pytest.fixture(params=list(tiny.CONFIGS))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest deviation, as a share of the largest value."""
    assert ours.shape == theirs.shape
    return float((ours.cpu() - theirs.cpu()).abs().max() / theirs.abs().max())


def random_ids(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(i) for i in torch.randint(4, tiny.VOCABULARY, (length,), generator=generator)]


def run_hugging_face(architecture: str, ids: list[int]) -> Any:
    with torch.no_grad():
        return tiny.hf_model(architecture)(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)


def as_prompt(ids: list[int], name: str = "1") -> TokenizedPrompt:
    return TokenizedPrompt("set", name, "", "", tuple(ids), None, False)


def run(model: Model, prompts: list[list[int]], **options: Any) -> list[Generation]:
    hooks = [*residual_hooks(model.n_layers, model.hook_names, attn_out=True), *attention_hooks(model.n_layers)]
    named = [as_prompt(ids, str(number)) for number, ids in enumerate(prompts)]
    outcomes = list(generate(model, named, hooks=hooks, **options))
    assert all(isinstance(outcome, Generation) for outcome in outcomes)
    return sorted(outcomes, key=lambda outcome: int(outcome.prompt.id))


def test_residuals_attentions_and_logits_equal_hugging_face(architecture: str, engine: str) -> None:
    model = tiny.model(architecture, engine)
    ids = random_ids(LONGER_THAN_ANY_WINDOW)
    theirs = run_hugging_face(architecture, ids)
    hooks = [*residual_hooks(model.n_layers, model.hook_names, attn_out=True), *attention_hooks(model.n_layers)]
    cache = teacher_force(model, ids, hooks)
    stream = residual_view(cache, model.n_layers, attn_out=True)
    for layer in range(model.n_layers):
        assert relative(stream.at(layer, "residual_in"), theirs.hidden_states[layer][0]) < 1e-4
        assert relative(cache[f"blocks.{layer}.attn.hook_pattern"], theirs.attentions[layer][0]) < 1e-4
    # Hugging Face's last hidden state is behind the final norm, ours before: they meet in the logits.
    assert relative(model.unembed(stream.at(model.n_layers - 1, "residual_out")), theirs.logits[0]) < 1e-4


# The module of a Hugging Face block whose input is the residual stream behind attention.
READS_AFTER_ATTENTION = {
    "gpt2": "transformer.h.{}.ln_2",
    "gpt_neox_sequential": "gpt_neox.layers.{}.post_attention_layernorm",
    "llama": "model.layers.{}.post_attention_layernorm",
    "qwen2": "model.layers.{}.post_attention_layernorm",
    "gemma2": "model.layers.{}.pre_feedforward_layernorm",
}


@pytest.mark.parametrize("name", list(READS_AFTER_ATTENTION))
def test_after_attn_is_what_the_second_norm_reads(name: str, engine: str) -> None:
    model, reference, ids = tiny.model(name, engine), tiny.hf_model(name), random_ids(12)
    read: dict[int, Tensor] = {}
    handles = [
        reference.get_submodule(READS_AFTER_ATTENTION[name].format(layer)).register_forward_pre_hook(
            lambda module, inputs, layer=layer: read.__setitem__(layer, inputs[0][0])
        )
        for layer in range(model.n_layers)
    ]
    run_hugging_face(name, ids)
    for handle in handles:
        handle.remove()
    stream = residual_view(teacher_force(model, ids, residual_hooks(model.n_layers, model.hook_names)), model.n_layers)
    for layer in range(model.n_layers):
        assert relative(stream.at(layer, "after_attn"), read[layer]) < 1e-4


def test_residual_points_add_up(architecture: str, engine: str) -> None:
    model = tiny.model(architecture, engine)
    ids = random_ids(12)
    hooks = [*residual_hooks(model.n_layers, model.hook_names, attn_out=True), "blocks.1.hook_mlp_out"]
    cache = teacher_force(model, ids, hooks)
    stream = residual_view(cache, model.n_layers, attn_out=True)
    for layer in range(model.n_layers):
        expected = stream.at(layer, "residual_in") + stream.at(layer, "attn_out")
        assert relative(stream.at(layer, "after_attn"), expected) < 1e-5
    expected = stream.at(1, "after_attn") + cache["blocks.1.hook_mlp_out"]
    assert relative(stream.at(1, "residual_out"), expected) < 1e-5


def test_generated_tokens_and_their_activations_equal_hugging_face(architecture: str, engine: str) -> None:
    model = tiny.model(architecture, engine)
    ids = random_ids(20, seed=1)
    (generation,) = run(model, [ids], max_new_tokens=12, sampling=Sampling(temperature=0))
    reference = tiny.hf_model(architecture)
    with torch.no_grad():
        tokens = reference.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=sorted({1, 3}),
            pad_token_id=1,
        )
    assert list(generation.token_ids) == tokens[0].tolist()
    # One pass over all tokens: the last generated one has its activations too, and none is shifted.
    theirs = run_hugging_face(architecture, tokens[0].tolist())
    stream = residual_view(generation.cache, model.n_layers)
    assert stream.n_tokens == tokens.shape[1]
    for layer in range(model.n_layers):
        assert relative(stream.at(layer, "residual_in"), theirs.hidden_states[layer][0]) < 1e-4
        pattern = generation.cache[f"blocks.{layer}.attn.hook_pattern"]
        assert relative(pattern, theirs.attentions[layer][0]) < 1e-4


def test_a_left_padded_batch_yields_what_each_prompt_yields_alone(architecture: str, engine: str) -> None:
    model = tiny.model(architecture, engine)
    prompts = [random_ids(length, seed=length) for length in (3, 30, 17)]
    options = {"max_new_tokens": 8, "sampling": Sampling(temperature=0)}
    together = run(model, prompts, batch_size=3, **options)
    alone = run(model, prompts, batch_size=1, **options)
    for batched, single in zip(together, alone, strict=True):
        assert batched.response_ids == single.response_ids
        for name, activation in single.cache.items():
            assert relative(batched.cache[name], activation) < 1e-4
