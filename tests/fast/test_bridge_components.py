"""The components of a bridge give the bits of TransformerLens's own, and its hooks act as ever."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tlcapture.models.engines import bridge
from tlcapture.models.loading import from_hugging_face
from tlcapture.views.hooks import hook, layer_hooks

FAMILIES = ["llama", "gpt2", "gpt_neox", "mistral", "qwen3", "gemma2"]
POINTS = (
    "ln1.hook_scale", "ln2.hook_normalized", "hook_out", "attn.hook_in", "attn.hook_out", "attn.hook_attn_scores",
    "attn.hook_pattern", "attn.q.hook_out", "attn.v.hook_in", "attn.o.hook_in", "mlp.hook_in",
    "mlp.out.hook_out",
)  # fmt: skip


def plain(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The bridge with TransformerLens's own components."""
    with monkeypatch.context() as patch:
        patch.setattr(bridge, "make_components_fast", lambda tl: None)
        source = copy.deepcopy(tiny.hf_model(name))
        return from_hugging_face(source, tiny.tokenizer(), name=f"tiny-{name}", engine="bridge", device=tiny.DEVICE)


def tokens() -> Tensor:
    return torch.randint(4, 200, (2, 9), generator=torch.Generator().manual_seed(0)).to(tiny.DEVICE)


@pytest.mark.parametrize("name", FAMILIES)
def test_activations_and_logits_have_the_bits_of_transformer_lens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, own = tiny.model(name, "bridge").tl, plain(name, monkeypatch).tl
    with torch.no_grad():
        assert torch.equal(fast(tokens()), own(tokens()))
        found, cache = fast.run_with_cache(tokens(), return_cache_object=False)
        expected, expected_cache = own.run_with_cache(tokens(), return_cache_object=False)
    assert torch.equal(found, expected)
    assert cache.keys() == expected_cache.keys()
    assert all(torch.equal(cache[each], expected_cache[each]) for each in cache)


@pytest.mark.parametrize("name", FAMILIES)
def test_names_of_hooks_are_resolved_once_and_again_when_there_are_others(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, own = copy.deepcopy(tiny.model(name, "bridge").tl), plain(name, monkeypatch).tl
    resolved: list[str] = []
    collect = type(own)._add_aliases_to_hooks
    patched = lambda bridge, hooks: (resolved.append(name), collect(bridge, hooks))  # noqa: E731
    monkeypatch.setattr(type(own), "_add_aliases_to_hooks", patched)
    fast.hook_dict.clear()  # whose dict is the caller's
    assert fast.hook_dict.keys() == own.hook_dict.keys()
    assert {each: point.name for each, point in fast.hook_dict.items()} == {
        each: point.name for each, point in own.hook_dict.items()
    }
    resolved.clear()
    fast.run_with_cache(tokens())
    assert resolved == []
    fast._hook_registry["more"] = fast.hook_dict["blocks.0.hook_out"]
    assert fast.hook_dict["more"] is fast.hook_dict["blocks.0.hook_out"]
    assert resolved == [name]


@pytest.mark.filterwarnings("ignore:.*norm.*")  # of TransformerLens, where a hook edits what a norm divides by
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("point", POINTS)
def test_hooks_change_what_they_change_in_transformer_lens(
    name: str, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(activation: Tensor, *, hook: Any) -> Tensor:
        return activation * 2

    fast, own = tiny.model(name, "bridge").tl, plain(name, monkeypatch).tl
    hooks = [(f"blocks.1.{point}", doubled)]
    with torch.no_grad():
        found, expected = (each.run_with_hooks(tokens(), fwd_hooks=hooks) for each in (fast, own))
        assert torch.equal(found, expected)
        assert not torch.equal(found, fast(tokens()))


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_have_the_bits_of_transformer_lens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(model: Any) -> list[Tensor]:
        state, ones = model.start(2), torch.ones(2, 1, dtype=torch.long)
        return [
            model.step(each, ones, state, {hook("residual_out", 1)}, want_logits=True).cache[hook("residual_out", 1)]
            for each in tokens().split(1, dim=1)
        ]

    found = steps(tiny.model(name, "bridge"))
    monkeypatch.setattr(bridge, "FAST", False)
    assert all(map(torch.equal, found, steps(plain(name, monkeypatch))))


def test_gradients_are_those_of_transformer_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient(tl: Any) -> Tensor:
        weight = tl.blocks[0].ln1.original_component.weight.requires_grad_(True)
        (found,) = torch.autograd.grad(tl(tokens()).square().sum(), weight)
        weight.requires_grad_(False)
        return found

    assert torch.equal(gradient(tiny.model("llama", "bridge").tl), gradient(plain("llama", monkeypatch).tl))


def test_norms_compute_nothing_for_hook_points_without_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    def calls(tl: Any) -> int:
        with torch.no_grad(), torch.profiler.profile() as profile:
            tl(tokens())
        return sum(each.count for each in profile.key_averages() if each.key == "aten::rsqrt")

    n_norms = 2 * tiny.N_LAYERS + 1
    assert calls(tiny.model("llama", "bridge").tl) == n_norms
    assert calls(plain("llama", monkeypatch).tl) == 2 * n_norms


def test_weights_that_accelerate_offloads_are_still_moved_for_a_component() -> None:
    from accelerate import cpu_offload

    tl = copy.deepcopy(tiny.model("llama", "bridge").tl)
    with torch.no_grad():
        expected = tl(tokens())
        norm = tl.blocks[0].ln1
        cpu_offload(norm.original_component, execution_device=torch.device(tiny.DEVICE))
        assert norm.original_component.weight.is_meta
        assert torch.equal(tl(tokens()), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_records_at_each_point_what_transformer_lens_records(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(model: Any, hooks: set[str]) -> dict[str, Tensor]:
        return dict(model.step(tokens(), torch.ones_like(tokens()), model.start(2), hooks, want_logits=False).cache)

    fast = tiny.model(name, "bridge")
    monkeypatch.setattr(bridge, "FAST", False)
    own = plain(name, monkeypatch)
    each_layer = {kind for layer in range(tiny.N_LAYERS) for kind in layer_hooks(layer)} & set(own.hook_names)
    expected = step(own, each_layer)
    found = step(fast, each_layer)
    assert found.keys() == expected.keys() and len(found) > 10 * tiny.N_LAYERS
    assert all(torch.equal(found[each], expected[each]) for each in expected)
    for each in sorted(each_layer):  # alone, so that attention and norms need not be computed in pieces
        assert torch.equal(step(fast, {each})[each], expected[each]), each
    assert fast.tl.hook_dict.keys() == own.tl.hook_dict.keys()


def test_a_hook_of_the_user_acts_before_a_step_records() -> None:
    model, name = tiny.model("llama", "bridge"), hook("residual_out", 1)

    def recorded() -> Tensor:
        ones = torch.ones_like(tokens())
        return model.step(tokens(), ones, model.start(2), {name}, want_logits=False).cache[name]

    expected = recorded()
    with model.tl.hooks(fwd_hooks=[(name, lambda activation, hook: activation * 2)]):
        assert torch.equal(recorded(), expected * 2)
    assert torch.equal(recorded(), expected)
