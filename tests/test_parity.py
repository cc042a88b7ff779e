"""Every activation equals that of Hugging Face at the same point, for every architecture and engine."""

from __future__ import annotations

import copy
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.evidence import Evidence
from tlcapture.generation.loop import generate, teacher_force
from tlcapture.generation.outcomes import Generation
from tlcapture.generation.sampling.next_token import Sampling
from tlcapture.models.loading import Model
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.views.attention import attention_hooks
from tlcapture.views.logit_lens import logit_lens_view
from tlcapture.views.residual import residual_hooks, residual_view

ENGINES = ("hooked", "plain", "bridge") if "hooked" in tiny.ENGINES else tiny.ENGINES
# OLMo-2 has no fast forward pass: `hooked` equals `plain`.
SUPPORTED = [(name, engine) for name in tiny.CONFIGS for engine in ENGINES if (name, engine) != ("olmo2", "plain")]
SUPPORTED += [(name, "bridge") for name in tiny.BRIDGE_ONLY]
if "hooked" not in tiny.ENGINES:  # TransformerLens 4, whose bridge computes ALiBi correctly
    SUPPORTED += [(name, "bridge") for name in tiny.ALIBI]
LONGER_THAN_ANY_WINDOW = 40
N_DECODED = 12
BFLOAT16 = torch.bfloat16

each_supported_model = pytest.mark.parametrize(("architecture", "engine"), SUPPORTED)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Deviations:
    """The largest deviation of each kind in a test, added to the evidence if all are within the bound."""

    def __init__(self, evidence: Evidence, architecture: str, engine: str):
        self._evidence = evidence
        self._key = (architecture, "hooked, fast=False" if engine == "plain" else engine)
        self._largest: dict[str, float] = {}

    def record(self, what: str, ours: Tensor, theirs: Tensor) -> None:
        """Add the relative deviation of a tensor of kind `what`."""
        self._largest[what] = max(relative(ours, theirs), self._largest.get(what, 0.0))

    def assert_below(self, bound: float) -> None:
        """Assert that all deviations are below a bound, and add them to the evidence."""
        assert all(value < bound for value in self._largest.values()), self._largest
        for what, value in self._largest.items():
            self._evidence.deviated(*self._key, what, value)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute deviation divided by the largest absolute value of `theirs`."""
    assert ours.shape == theirs.shape
    return float((ours.cpu() - theirs.cpu()).abs().max() / theirs.abs().max())


def random_ids(length: int, seed: int = 0) -> list[int]:
    """Ids of ordinary tokens, without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return [int(i) for i in torch.randint(4, tiny.VOCABULARY, (length,), generator=generator)]


def run_hugging_face(architecture: str, ids: list[int]) -> Any:
    """What Hugging Face's model computes: once, for all engines that are compared with it."""
    return _hugging_face(architecture, tuple(ids), torch.float32)


@cache
def _hugging_face(architecture: str, ids: tuple[int, ...], dtype: torch.dtype) -> Any:
    with torch.no_grad():
        model = tiny.hf_model(architecture, dtype)
        return model(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)


@cache
def written_by_hugging_face(architecture: str, ids: tuple[int, ...]) -> list[int]:
    """The tokens of a prompt and of Hugging Face's greedy response."""
    with torch.no_grad():
        tokens = tiny.hf_model(architecture).generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=N_DECODED,
            do_sample=False,
            eos_token_id=1,  # the prompts are plain, so that the end of a turn does not end them
            pad_token_id=1,
        )
    return list(tokens[0].tolist())


def as_prompt(ids: list[int], name: str = "1") -> TokenizedPrompt:
    return TokenizedPrompt("set", name, "", "", tuple(ids), None, False)


def run(model: Model, prompts: list[list[int]], **options: Any) -> list[Generation]:
    hooks = residual_hooks(model.n_layers, model.hook_names, attn_out=True)
    hooks += attention_hooks(model.n_layers, model.hook_names)
    named = [as_prompt(ids, str(number)) for number, ids in enumerate(prompts)]
    outcomes = list(generate(model, named, hooks=hooks, **options))
    assert all(isinstance(outcome, Generation) for outcome in outcomes)
    return sorted(outcomes, key=lambda outcome: int(outcome.prompt.id))


@each_supported_model
def test_residuals_attentions_lens_and_logits_equal_hugging_face(
    architecture: str, engine: str, evidence: Evidence
) -> None:
    model = tiny.model(architecture, engine)
    ids = random_ids(LONGER_THAN_ANY_WINDOW)
    theirs = run_hugging_face(architecture, ids)
    deviations = Deviations(evidence, architecture, engine)
    hooks = residual_hooks(model.n_layers, model.hook_names, attn_out=True)
    hooks += attention_hooks(model.n_layers, model.hook_names)
    cache = teacher_force(model, ids, hooks)
    stream = residual_view(cache, model.n_layers, attn_out=True)
    for layer in range(model.n_layers):
        deviations.record("prompt", stream.at(layer, "residual_in"), theirs.hidden_states[layer][0])
        deviations.record("prompt", cache[f"blocks.{layer}.attn.hook_pattern"], theirs.attentions[layer][0])
    # Hugging Face's last hidden state is after the final norm, ours before it: compare logits instead.
    last = stream.at(model.n_layers - 1, "residual_out")
    deviations.record("prompt", model.unembed(last), theirs.logits[0])
    lens = logit_lens_view(lambda layer: last, 1, ids, model.unembed)
    probabilities = theirs.logits[0, :-1].softmax(dim=-1)
    deviations.record("prompt", lens.actual_prob[0], probabilities.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    deviations.assert_below(1e-4)


# The module of a Hugging Face block whose input is the residual stream after attention.
READS_AFTER_ATTENTION = {
    "gpt2": "transformer.h.{}.ln_2",
    "gpt_neox_sequential": "gpt_neox.layers.{}.post_attention_layernorm",
    "llama": "model.layers.{}.post_attention_layernorm",
    "qwen2": "model.layers.{}.post_attention_layernorm",
    "gemma2": "model.layers.{}.pre_feedforward_layernorm",
    "gemma3": "model.layers.{}.pre_feedforward_layernorm",
    "olmo2": "model.layers.{}.mlp",
}


@pytest.mark.parametrize("name", list(READS_AFTER_ATTENTION))
def test_after_attn_equals_the_input_of_the_second_norm(name: str, engine: str) -> None:
    model, reference, ids = tiny.model(name, engine), tiny.hf_model(name), random_ids(12)
    read: dict[int, Tensor] = {}
    handles = [
        reference.get_submodule(READS_AFTER_ATTENTION[name].format(layer)).register_forward_pre_hook(
            lambda module, inputs, layer=layer: read.__setitem__(layer, inputs[0][0])
        )
        for layer in range(model.n_layers)
    ]
    with torch.no_grad():
        reference(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    stream = residual_view(teacher_force(model, ids, residual_hooks(model.n_layers, model.hook_names)), model.n_layers)
    for layer in range(model.n_layers):
        assert relative(stream.at(layer, "after_attn"), read[layer]) < 1e-4


@each_supported_model
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


@each_supported_model
def test_generated_tokens_and_their_activations_equal_hugging_face(
    architecture: str, engine: str, evidence: Evidence
) -> None:
    model = tiny.model(architecture, engine)
    ids = random_ids(20, seed=1)
    (generation,) = run(model, [ids], max_new_tokens=N_DECODED, sampling=Sampling(temperature=0))
    tokens = written_by_hugging_face(architecture, tuple(ids))
    assert list(generation.token_ids) == tokens
    # One pass over all tokens shows that activations are not shifted and that the last generated token has them too.
    theirs = run_hugging_face(architecture, tokens)
    deviations = Deviations(evidence, architecture, engine)
    stream = residual_view(generation.cache, model.n_layers)
    assert stream.n_tokens == len(tokens) > len(ids)
    for what, span in (("prompt", slice(0, len(ids))), ("decode", slice(len(ids), None))):
        for layer in range(model.n_layers):
            deviations.record(what, stream.at(layer, "residual_in")[span], theirs.hidden_states[layer][0, span])
            pattern = generation.cache[f"blocks.{layer}.attn.hook_pattern"]
            deviations.record(what, pattern[:, span], theirs.attentions[layer][0, :, span])
        last = stream.at(model.n_layers - 1, "residual_out")
        deviations.record(what, model.unembed(last[span]), theirs.logits[0, span])
    deviations.assert_below(1e-4)


@each_supported_model
def test_a_left_padded_batch_equals_each_prompt_alone(architecture: str, engine: str, evidence: Evidence) -> None:
    model = tiny.model(architecture, engine)
    prompts = [random_ids(length, seed=length) for length in (3, 30, 17)]
    options = {"max_new_tokens": 4, "sampling": Sampling(temperature=0)}
    together = run(model, prompts, batch_size=3, **options)
    alone = run(model, prompts, batch_size=1, **options)
    deviations = Deviations(evidence, architecture, engine)
    for batched, single in zip(together, alone, strict=True):
        assert batched.response_ids == single.response_ids
        for name, activation in single.cache.items():
            assert relative(batched.cache[name], activation) < 1e-4
        theirs = run_hugging_face(architecture, list(batched.token_ids))
        stream = residual_view(batched.cache, model.n_layers)
        for layer in range(model.n_layers):
            deviations.record("padded batch", stream.at(layer, "residual_in"), theirs.hidden_states[layer][0])
            pattern = batched.cache[f"blocks.{layer}.attn.hook_pattern"]
            deviations.record("padded batch", pattern, theirs.attentions[layer][0])
    deviations.assert_below(1e-4)


@each_supported_model
def test_the_error_in_bfloat16_is_close_to_that_of_hugging_face(
    architecture: str, engine: str, evidence: Evidence
) -> None:
    """A prompt and four decode steps, at every layer and in the logits, compared with Hugging Face in float32.

    The norm of the error is at most 1.5 times that of Hugging Face in bfloat16, and a tenth of that of the activations.
    """
    model, ids = tiny.model(architecture, engine, BFLOAT16), random_ids(LONGER_THAN_ANY_WINDOW)
    exact = run_hugging_face(architecture, ids)
    theirs = _hugging_face(architecture, tuple(ids), BFLOAT16)
    hooks = residual_hooks(model.n_layers, model.hook_names)
    state, parts = model.start(1), []
    for start, stop in pairwise([0, *range(LONGER_THAN_ANY_WINDOW - 4, LONGER_THAN_ANY_WINDOW + 1)]):
        tokens = torch.tensor([ids[start:stop]])
        step = model.step(tokens, torch.ones_like(tokens), state, frozenset(hooks), want_logits=False)
        parts.append({name: activation[0].cpu() for name, activation in step.cache.items()})
    stream = residual_view({name: torch.cat([part[name] for part in parts]) for name in hooks}, model.n_layers)
    assert stream.points.dtype == BFLOAT16
    triples = [(model.unembed(stream.at(model.n_layers - 1, "residual_out")), theirs.logits[0], exact.logits[0])]
    for layer in range(model.n_layers):
        hidden = (theirs.hidden_states[layer][0], exact.hidden_states[layer][0])
        triples.append((stream.at(layer, "residual_in"), *hidden))
    deviations = Deviations(evidence, architecture, engine)
    for ours, other, true in triples:
        error, its_error = ((each.float().cpu() - true).norm() / true.norm() for each in (ours, other))
        assert error <= 1.5 * its_error
        assert error < 0.1
        deviations.record("bfloat16", ours.float(), true)
    deviations.assert_below(0.3)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_neo", "mistral", "phi3"])
def test_sliding_window_layers_match_the_config_and_attend_only_within_the_window(name: str, engine: str) -> None:
    model, config = tiny.model(name, engine), tiny.hf_model(name).config
    window = config.window_size if name == "gpt_neo" else config.sliding_window
    if name == "gpt_neo":
        kinds = ["sliding_attention" if kind == "local" else "full_attention" for kind in config.attention_layers]
    else:
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * model.n_layers
    if name.startswith(("gemma", "gpt")):
        assert len(set(kinds)) == 2
    cache = teacher_force(model, random_ids(LONGER_THAN_ANY_WINDOW), attention_hooks(model.n_layers, model.hook_names))
    for layer, kind in enumerate(kinds):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        beyond = torch.ones_like(pattern[0], dtype=torch.bool).tril(-window)
        assert beyond.any()
        seen = float(pattern[:, beyond].abs().max())
        assert (seen == 0) if kind == "sliding_attention" else (seen > 1e-3), (layer, kind)
    if engine != "bridge":
        ours = [block.attn.attn_type for block in model.tl.blocks]
        assert ours == ["local" if kind == "sliding_attention" else "global" for kind in kinds]


@pytest.mark.parametrize("cap", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_each_soft_cap_of_gemma_2_changes_the_logits(cap: str) -> None:
    """Logits differ without it, so equality with Hugging Face tests both soft caps."""
    free, ids = copy.deepcopy(tiny.hf_model("gemma2")), random_ids(LONGER_THAN_ANY_WINDOW)
    setattr(free.config, cap, None)
    for layer in free.model.layers:
        layer.self_attn.attn_logit_softcapping = free.config.attn_logit_softcapping
    with torch.no_grad():
        without = free(torch.tensor([ids])).logits[0]
    assert relative(run_hugging_face("gemma2", ids).logits[0], without) > 0.01
