"""The fast forward pass has the activations of TransformerLens at every hook point, with and without edits."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.test_parity import random_ids, relative
from tlcapture.generation.loop import generate
from tlcapture.generation.sampling.next_token import Sampling
from tlcapture.models.fast import layers
from tlcapture.models.fast.forward import FastForward
from tlcapture.models.loading import Model, from_hooked_transformer, from_hugging_face
from tlcapture.views.residual import residual_hooks

pytestmark = tiny.needs_hooked


@pytest.fixture(params=[name for name in tiny.CONFIGS if name != "olmo2"])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def is_fast(model: Model) -> bool:
    """Whether the fast forward pass would compute a new batch."""
    from tlcapture.models.fast.cache import FastCache

    return isinstance(model.start(1), FastCache)


def steps(model: Model, hooks: set[str], *, reserve: bool = False) -> list[dict[str, Tensor]]:
    """Activations and logits of a padded prompt of three rows and three decode steps, the last two without one row."""
    tokens = torch.tensor([random_ids(20, seed=row) for row in range(3)])
    mask = torch.ones_like(tokens)
    mask[0, :7], mask[2, :15] = 0, 0
    state = model.start(3)
    if reserve:
        model.reserve(state, 23)
    one, found = torch.ones(3, 1, dtype=torch.long), []

    def step(tokens: Tensor, mask: Tensor, so_far: Tensor) -> Tensor:
        step = model.step(tokens, mask, state, hooks, want_logits=True)
        assert step.logits is not None
        cache = {**step.cache, "logits": step.logits}
        so_far = torch.cat([so_far, mask], dim=1)
        found.append({name: without_padding(each, so_far.bool()).clone() for name, each in cache.items()})
        return so_far

    so_far = step(tokens, mask, mask[:, :0])
    so_far = step(tokens[:, :1], one, so_far)
    model.keep(state, torch.tensor([True, False, True]))
    so_far = step(tokens[:2, 1:2], one[:2], so_far[[0, 2]])
    step(tokens[:2, 2:3], one[:2], so_far)
    return found


def without_padding(activation: Tensor, mask: Tensor) -> Tensor:
    """An activation without the rows of padding, whose values are unspecified, if it has all positions of the mask."""
    if activation.shape[:2] == mask.shape:
        return activation[mask]
    if activation.ndim == 4 and activation.shape[2] == mask.shape[1]:
        return activation.transpose(1, 2)[mask]
    return activation


@cache
def steps_of_transformer_lens(architecture: str) -> tuple[set[str], list[dict[str, Tensor]]]:
    """The hook points up to the last block (both engines compute the rest in `unembed`), and `steps` with them."""
    plain = tiny.model(architecture, "plain")
    assert not is_fast(plain)
    with torch.no_grad():
        _, everything = plain.tl.run_with_cache(torch.tensor([random_ids(4)]), return_cache_object=False)
    hooks = {name for name in everything if not name.startswith(("ln_final", "unembed"))}
    assert len(hooks) > 16 * plain.n_layers
    return hooks, steps(plain, hooks)


def test_every_hook_point_equals_transformer_lens(architecture: str) -> None:
    fast, (hooks, expected) = tiny.model(architecture), steps_of_transformer_lens(architecture)
    assert is_fast(fast)
    for ours, theirs in zip(steps(fast, hooks), expected, strict=True):
        assert ours.keys() == theirs.keys() == hooks | {"logits"}
        for name in ours:
            finite = theirs[name].isfinite()  # masked scores are -inf
            assert torch.equal(ours[name].isfinite(), finite), name
            assert relative(ours[name][finite], theirs[name][finite]) < 1e-4, name


def test_olmo_2_is_computed_by_transformer_lens() -> None:
    """Its norms come after the sublayers, and those of queries and keys span all heads."""
    assert not FastForward.supports(tiny.model("olmo2").tl)


EDITED_POINTS = [
    "hook_embed",
    "blocks.1.hook_resid_pre",
    "blocks.1.ln1.hook_normalized",
    "blocks.1.attn.hook_q",
    "blocks.1.attn.hook_k",
    "blocks.1.attn.hook_v",
    "blocks.1.attn.hook_rot_q",
    "blocks.1.attn.hook_rot_k",
    "blocks.1.attn.hook_attn_scores",
    "blocks.1.attn.hook_pattern",
    "blocks.1.attn.hook_z",
    "blocks.1.hook_attn_out",
    "blocks.1.hook_resid_mid",
    "blocks.1.ln2.hook_scale",
    "blocks.1.mlp.hook_pre",
    "blocks.1.mlp.hook_pre_linear",
    "blocks.1.mlp.hook_post",
    "blocks.1.hook_mlp_out",
    "blocks.1.hook_resid_post",
]


@pytest.mark.parametrize("name", EDITED_POINTS)
def test_the_value_that_a_hook_returns_is_used_downstream(name: str) -> None:
    def edit(activation: Tensor, hook: Any) -> Tensor:
        return activation * 1.5

    last, found = {"blocks.2.hook_resid_post"}, []
    for model in (tiny.model("llama"), tiny.model("llama", "plain")):
        with model.tl.hooks(fwd_hooks=[(name, edit)]):
            found.append([cache["blocks.2.hook_resid_post"] for cache in steps(model, last)])
    untouched = [cache["blocks.2.hook_resid_post"] for cache in steps(tiny.model("llama"), last)]
    for ours, theirs, without in zip(*found, untouched, strict=True):
        assert relative(ours, theirs) < 1e-4
        assert relative(without, theirs) > 1e-3


@pytest.mark.parametrize("name", ["unembed.hook_in", "unembed.hook_out"])
def test_hooks_of_the_unembedding_are_called(name: str) -> None:
    model, residual = tiny.model("llama"), torch.randn(4, tiny.D_MODEL)
    before = model.unembed(residual)
    with model.tl.hooks(fwd_hooks=[(name, lambda activation, hook: activation * 2)]):
        assert relative(model.unembed(residual), 2 * before) < 1e-5


def test_a_nonzero_bias_of_the_unembedding_is_added() -> None:
    model, residual = tiny.model("llama"), torch.randn(4, tiny.D_MODEL)
    before, bias = model.unembed(residual), model.tl.unembed.b_U
    try:
        bias.data.fill_(3.0)
        assert torch.allclose(model.unembed(residual), before + 3)
    finally:
        bias.data.zero_()


def test_unsupported_options_are_computed_by_transformer_lens() -> None:
    model = tiny.model("llama")
    model.tl.set_use_attn_result(True)
    try:
        assert not FastForward.supports(model.tl)
        (generation,) = generate(
            model,
            [tiny_prompt()],
            hooks=["blocks.0.attn.hook_result"],
            max_new_tokens=2,
            sampling=Sampling(temperature=0),
        )
        assert generation.cache["blocks.0.attn.hook_result"].shape[1:] == (tiny.N_HEADS, tiny.D_MODEL)
    finally:
        model.tl.set_use_attn_result(False)


def test_replaced_weights_are_used() -> None:
    plain, name = tiny.model("qwen2", "plain"), "blocks.2.hook_resid_post"
    model = from_hooked_transformer(copy.deepcopy(plain.tl))
    weights = [each.tl.blocks[1].attn.W_O for each in (model, plain)]
    before, originals = steps(model, {name}), [weight.data for weight in weights]
    try:
        for weight in weights:
            weight.data = torch.zeros_like(weight)
        ours, theirs = (steps(each, {name})[2][name] for each in (model, plain))
        assert relative(ours, before[2][name]) > 1e-3
        assert relative(ours, theirs) < 1e-4
    finally:
        for weight, original in zip(weights, originals, strict=True):
            weight.data = original


@pytest.mark.parametrize("module", ["", "blocks.1", "blocks.1.attn", "blocks.1.ln1", "blocks.1.mlp"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_models_with_module_hooks_are_computed_by_transformer_lens(module: str, register: str) -> None:
    calls: list[Any] = []
    model = tiny.model("llama")
    handle = getattr(model.tl.get_submodule(module), register)(lambda *args: calls.append(args))
    try:
        steps(model, {"blocks.2.hook_resid_post"})
        assert calls
    finally:
        handle.remove()
    assert is_fast(model)


def test_models_with_pre_hooks_are_computed_by_transformer_lens() -> None:
    model = tiny.model("llama")
    handle = model.tl.blocks[1].hook_resid_pre.register_forward_pre_hook(lambda point, args: (args[0] * 1.5,))
    try:
        assert not FastForward.supports(model.tl)
    finally:
        handle.remove()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_replaced_activation_function_is_used(architecture: str) -> None:
    hooks = {"blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_post", "blocks.2.hook_resid_post"}
    before = steps(tiny.model(architecture), hooks)
    found = []
    for model in (tiny.model(architecture), tiny.model(architecture, "plain")):
        mlp = model.tl.blocks[1].mlp
        original = mlp.act_fn
        try:
            mlp.act_fn = lambda x: x  # returns its input, which must not be modified
            found.append(steps(model, hooks))
        finally:
            mlp.act_fn = original
    for ours, theirs, without in zip(*found, before, strict=True):
        assert all(relative(ours[name], theirs[name]) < 1e-4 for name in hooks)
        assert relative(without["blocks.1.mlp.hook_post"], ours["blocks.1.mlp.hook_post"]) > 1e-2


@pytest.mark.parametrize(
    "name", ["hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_pattern", "attn.hook_z"]
)
def test_hooks_may_return_a_wider_dtype_than_the_model(name: str) -> None:
    """For example, by adding a float32 vector to a bfloat16 residual stream."""
    last, found = {"blocks.2.hook_resid_post"}, []
    for mode in ("fast", "plain"):
        half = tiny.hf_model("llama", torch.bfloat16)
        model = from_hugging_face(half, tiny.tokenizer(), name="half", engine="hooked", fast=mode == "fast")
        hook = (f"blocks.1.{name}", lambda a, hook: a * torch.full(a.shape[-1:], 1.5))
        with model.tl.hooks(fwd_hooks=[hook]):
            found.append([cache["blocks.2.hook_resid_post"].float() for cache in steps(model, last)])
    for ours, theirs in zip(*found, strict=True):
        assert relative(ours, theirs) < 0.1  # the precision of bfloat16


def test_overflowing_scores_are_not_mistaken_for_padding() -> None:
    """Unfused float16 attention whose products overflow gives NaN, which generation refuses, rather than zeros."""
    half = tiny.hf_model("qwen2", torch.float16)
    model = from_hugging_face(half, tiny.tokenizer(), name="half", engine="hooked", fast=True)
    for block in model.tl.blocks:
        block.attn.b_Q.data.fill_(1000.0)
        block.attn._b_K.data.fill_(1000.0)
    for kept in steps(model, {"blocks.0.attn.hook_pattern"}):
        sums = kept["blocks.0.attn.hook_pattern"].float().sum(-1)
        assert not (sums == 0).any()


def test_a_branch_does_not_change_the_original_state() -> None:
    model, last = tiny.model("llama"), {"blocks.2.hook_resid_post"}
    tokens = torch.tensor([random_ids(10), random_ids(10, seed=1)])
    state = model.start(2)
    model.step(tokens, torch.ones_like(tokens), state, last, want_logits=False)
    one = torch.ones(2, 1, dtype=torch.long)
    branch = model.branch(state, [1, 1])
    model.step(tokens[:, 3:4], one, branch, last, want_logits=False)
    along = model.step(tokens[:, 5:6], one, state, last, want_logits=False).cache["blocks.2.hook_resid_post"]
    whole = torch.cat([tokens, tokens[:, 5:6]], dim=1)
    fresh = model.step(whole, torch.ones_like(whole), model.start(2), last, want_logits=False)
    assert relative(along, fresh.cache["blocks.2.hook_resid_post"][:, -1:]) < 1e-5


def test_decoding_beyond_the_capacity_of_the_first_buffer_equals_one_pass() -> None:
    model, last = tiny.model("gemma2"), {"blocks.2.hook_resid_post"}
    tokens = torch.tensor([random_ids(150)])
    state = model.start(1)
    pieces = [
        model.step(piece, torch.ones_like(piece), state, last, want_logits=False).cache["blocks.2.hook_resid_post"]
        for piece in tokens.split([5, *[1] * 145], dim=1)
    ]
    whole = model.step(tokens, torch.ones_like(tokens), model.start(1), last, want_logits=False)
    assert relative(torch.cat(pieces, dim=1), whole.cache["blocks.2.hook_resid_post"]) < 1e-4


@pytest.mark.parametrize("n_rows", [1, 3, 10, 15, 16])
def test_unembedding_few_rows_equals_hugging_face(n_rows: int) -> None:
    model = tiny.model("llama")
    residual = torch.randn(n_rows, tiny.D_MODEL, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = tiny.hf_model("llama").lm_head(tiny.hf_model("llama").model.norm(residual))
    assert relative(model.unembed(residual), theirs) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma"])
def test_the_error_in_half_precision_is_close_to_that_of_hugging_face(name: str) -> None:
    """At every layer, the error relative to float32 is at most 1.5 times that of Hugging Face in bfloat16."""
    exact, half = tiny.hf_model(name), tiny.hf_model(name, torch.bfloat16)
    model = from_hugging_face(half, tiny.tokenizer(), name="tiny-half", engine="hooked")
    tokens = torch.tensor([random_ids(30, seed=row) for row in range(8)])
    names = set(residual_hooks(model.n_layers, model.hook_names))
    step = model.step(tokens, torch.ones_like(tokens), model.start(8), names, want_logits=True)
    with torch.no_grad():
        truth, theirs = (hf(tokens, output_hidden_states=True) for hf in (exact, half))
    assert step.logits is not None and step.logits.dtype == torch.bfloat16
    pairs = [(step.logits, theirs.logits[:, -1], truth.logits[:, -1])]
    for layer in range(1, model.n_layers):
        hidden = (theirs.hidden_states[layer], truth.hidden_states[layer])
        pairs.append((step.cache[f"blocks.{layer - 1}.hook_resid_post"], *hidden))
    for ours, other, true in pairs:
        assert (ours.float() - true).norm() < 1.5 * (other.float() - true).norm()


@pytest.mark.parametrize("name", ["gemma2", "qwen2", "gpt2"])
def test_weights_that_are_multiplied_at_once_are_in_memory_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "JOINED_ON", {"cpu", "cuda"})
    model = tiny.model(name)
    layer = FastForward(model.tl)._layers[0]
    assert layer.qkv is not None and (layer.gate_and_in is not None) == bool(model.tl.cfg.gated_mlp)
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in model.tl.parameters()}
    in_memory = sum(storage.nbytes() for storage in storages.values())
    assert in_memory <= sum(each.nbytes for each in model.tl.parameters())  # fewer where the embedding is tied
    assert layer.qkv[0].untyped_storage().data_ptr() in storages


@pytest.mark.parametrize("point", ["attn.hook_q", "attn.hook_k", "attn.hook_v", "mlp.hook_pre", "mlp.hook_pre_linear"])
def test_activations_computed_at_once_are_kept_as_tensors_of_their_own(
    point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "JOINED_ON", {"cpu", "cuda"})
    model = tiny.model("gemma2")
    tokens = torch.tensor([random_ids(6, seed=row) for row in range(2)])
    name = f"blocks.1.{point}"
    kept = model.step(tokens, torch.ones_like(tokens), model.start(2), {name}, want_logits=False).cache[name]
    assert kept.is_contiguous() and kept.untyped_storage().nbytes() == kept.nbytes


def tiny_prompt() -> Any:
    from tests.test_parity import as_prompt

    return as_prompt(random_ids(6))
