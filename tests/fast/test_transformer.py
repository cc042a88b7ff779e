"""A FastHookedTransformer gives the results of HookedTransformer in direct calls, and runs every step of a capture."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.test_parity import as_prompt, random_ids, relative
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Generation
from tlcapture.generation.sampling.next_token import GREEDY
from tlcapture.models.fast.forward import FastForward
from tlcapture.models.loading import from_hooked_transformer

pytestmark = tiny.needs_hooked

NAMES = ["llama", "gpt2", "gemma2", "gptj", "qwen3"]


@pytest.fixture(autouse=True)
def without_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("gradients" in request.node.name):
        yield


@contextmanager
def passes(tl: Any) -> Iterator[list[str]]:
    """Record which implementation computes each forward pass of `tl`: `fast` or `TransformerLens`."""
    from transformer_lens import HookedTransformer

    seen: list[str] = []
    originals = FastForward.__call__, HookedTransformer.forward

    def fast(self: Any, *args: Any, **options: Any) -> Any:
        seen.append("fast")
        return originals[0](self, *args, **options)

    def plain(self: Any, *args: Any, **options: Any) -> Any:
        seen.append("TransformerLens")
        return originals[1](self, *args, **options)

    FastForward.__call__, HookedTransformer.forward = fast, plain  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        FastForward.__call__, HookedTransformer.forward = originals  # type: ignore[method-assign]


def pair(architecture: str = "llama") -> tuple[Any, Any]:
    """A FastHookedTransformer and a HookedTransformer with the same weights."""
    from transformer_lens import HookedTransformer

    fast, plain = tiny.model(architecture).tl, tiny.model(architecture, "plain").tl
    assert type(plain) is HookedTransformer and type(fast).__name__ == "FastHookedTransformer"
    return fast, plain


def batch(width: int = 12, rows: int = 3) -> tuple[Tensor, Tensor]:
    """Left-padded token ids and their mask."""
    tokens = torch.tensor([random_ids(width, seed=row) for row in range(rows)])
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    return tokens, mask


def agree(ours: Any, theirs: Any, bound: float = 1e-4) -> None:
    """Assert that tensors, or dicts or tuples of tensors, are close, with non-finite values at the same indices."""
    if isinstance(theirs, Tensor):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.device == theirs.device
        finite = theirs.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        if finite.any() and theirs[finite].abs().max() > 0:
            assert relative(ours[finite], theirs[finite]) < bound
    elif hasattr(theirs, "keys"):
        assert set(ours.keys()) == set(theirs.keys())
        for name in theirs.keys():  # noqa: SIM118  an ActivationCache is not a dict
            agree(ours[name], theirs[name], bound)
    elif isinstance(theirs, (tuple, list)):
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        for each, other in zip(ours, theirs, strict=True):
            agree(each, other, bound)
    else:
        assert ours == theirs


def both(call: Callable[[Any], Any], architecture: str = "llama", *, by: str = "fast") -> Any:
    """Assert that a call has the same result on both models, and that `by` computed ours; returns our result."""
    fast, plain = pair(architecture)
    with passes(fast) as seen:
        ours = call(fast)
    assert seen and set(seen) == {by}
    agree(ours, call(plain))
    return ours


# A capture


def test_every_forward_pass_of_a_capture_is_a_fast_one() -> None:
    model = tiny.model("llama")
    prompts = [as_prompt(random_ids(length, seed=length), str(length)) for length in (12, 7)]
    with passes(model.tl) as seen:
        (first, _) = generate(
            model, prompts, hooks=["blocks.1.hook_resid_post"], batch_size=2, max_new_tokens=5, sampling=GREEDY
        )
    assert isinstance(first, Generation)
    assert set(seen) == {"fast"}


def test_every_micro_batch_of_prompts_is_a_call_of_run_with_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from tlcapture.models.fast import forward

    model, calls = tiny.model("llama"), []
    run_with_cache = type(model.tl).run_with_cache

    def recording(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(args[0]))
        return run_with_cache(self, *args, **options)

    monkeypatch.setattr(forward, "_MAX_POSITIONS", {"cpu": 24, "cuda": 24})
    monkeypatch.setattr(type(model.tl), "run_with_cache", recording)
    tokens = torch.ones(5, 12, dtype=torch.long)
    state = model.start(5)
    steps = list(model.prompt_steps(tokens, torch.ones_like(tokens), state, {"hook_embed"}))
    assert calls == [2, 2, 1] and all(step.cache["hook_embed"].shape[1] == 12 for _, step in steps)
    model.step(tokens[:, :1], torch.ones(5, 1, dtype=torch.long), state, frozenset(), want_logits=False)
    assert calls == [2, 2, 1, 5]


# Direct calls of the model


@pytest.mark.parametrize("architecture", NAMES)
def test_run_with_cache_returns_every_activation_of_hooked_transformer(architecture: str) -> None:
    tokens, mask = batch()
    _, cache = both(lambda tl: tl.run_with_cache(tokens), architecture)
    assert {"ln_final.hook_scale", "ln_final.hook_normalized", "unembed.hook_in", "unembed.hook_out"} <= cache.keys()
    both(lambda tl: tl.run_with_cache(tokens, attention_mask=mask), architecture)
    both(lambda tl: tl(tokens, attention_mask=mask), architecture)


CACHE_OPTIONS: dict[str, dict[str, Any]] = {
    "one name": {"names_filter": "blocks.1.hook_resid_post"},
    "a function": {"names_filter": lambda name: name.endswith(("hook_z", "hook_pattern"))},
    "no name": {"names_filter": []},
    "a device": {"device": "cpu", "names_filter": ["hook_embed"]},
    "without batch": {"remove_batch_dim": True},
    "one position": {"pos_slice": -1},
    "a range of positions": {"pos_slice": (2, 9, 3)},
    "a list of positions": {"pos_slice": [1, 4], "names_filter": ["hook_embed", "blocks.1.attn.hook_z"]},
    "a dict": {"return_cache_object": False},
    "contexts": {"clear_contexts": True},
    "loss": {"return_type": "loss"},
    "loss per token": {"return_type": "loss", "loss_per_token": True},
    "both": {"return_type": "both"},
    "nothing": {"return_type": None},
    "the residual stream": {"stop_at_layer": tiny.N_LAYERS},
    "one row": {},
}


@pytest.mark.parametrize("what", CACHE_OPTIONS)
def test_options_of_run_with_cache_have_the_effect_they_have_in_hooked_transformer(what: str) -> None:
    rows = batch()[0][:1] if "batch" in what else batch()[0][0] if what == "one row" else batch()[0]
    both(lambda tl: tl.run_with_cache(rows, **CACHE_OPTIONS[what]))


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_text_is_tokenized_and_masked_as_hooked_transformer_does(padding_side: str, prepend_bos: bool) -> None:
    options = {"prepend_bos": prepend_bos, "padding_side": padding_side}
    both(lambda tl: tl("so it goes", return_type="both", **options))
    both(lambda tl: tl.run_with_cache(["so it goes", "so"], return_type="both", **options))


@pytest.mark.parametrize("architecture", NAMES)
def test_token_by_token_with_a_cache_equals_hooked_transformer(architecture: str) -> None:
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    from tlcapture.models.fast.cache import FastCache

    tokens, mask = batch()

    def run(tl: Any) -> Any:
        kind = FastCache if type(tl).__name__.startswith("Fast") else TransformerLensKeyValueCache
        cache = kind.init_cache(tl.cfg, tl.cfg.device, 3)
        first = tl(tokens, attention_mask=mask, past_kv_cache=cache)
        second = tl.run_with_cache(tokens[:, :2], past_kv_cache=cache)
        entries = [(entry.past_keys, entry.past_values) for entry in cache.entries]
        return first, second, entries, cache.previous_attention_mask

    both(run, architecture)


@pytest.mark.parametrize("architecture", NAMES)
def test_generate_returns_the_tokens_of_hooked_transformer(architecture: str) -> None:
    tokens = batch()[0]
    options = {"max_new_tokens": 8, "do_sample": False, "stop_at_eos": False, "verbose": False}
    both(lambda tl: tl.generate(tokens, **options), architecture)
    both(lambda tl: tl.generate(["so it goes", "so"], return_type="tokens", **options), architecture)
    both(lambda tl: tl.generate(tokens, output_logits=True, **options).logits, architecture)
    both(lambda tl: list(tl.generate_stream(tokens, max_tokens_per_yield=3, **options)), architecture)
    both(lambda tl: tl.generate(tokens, use_past_kv_cache=False, **options), architecture, by="TransformerLens")


def test_generate_unembeds_only_the_last_position_unless_hooks_need_all(monkeypatch: pytest.MonkeyPatch) -> None:
    tl, widths = pair()[0], []
    logits = FastForward.logits

    def recording(self: Any, normed: Tensor, points: Any) -> Tensor:
        widths.append(normed.shape[1])
        return logits(self, normed, points)

    monkeypatch.setattr(FastForward, "logits", recording)
    options = {"max_new_tokens": 2, "do_sample": False, "stop_at_eos": False, "verbose": False}
    tl.generate(batch()[0], **options)
    with tl.hooks(fwd_hooks=[("ln_final.hook_scale", lambda activation, hook: None)]):
        tl.generate(batch()[0], **options)
    assert widths == [1, 1, 12, 1]


def test_hooks_receive_and_edit_every_step_of_generate() -> None:
    def run(tl: Any) -> Any:
        seen: list[tuple[int, ...]] = []

        def edit(activation: Tensor, hook: Any) -> Tensor:
            seen.append(tuple(activation.shape))
            return activation * 1.5

        names = ("blocks.1.hook_resid_post", "ln_final.hook_normalized", "unembed.hook_out")
        with tl.hooks(fwd_hooks=[(name, edit) for name in names]):
            options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False}
            return tl.generate(batch()[0], **options), seen

    both(run)


# Calls that TransformerLens computes


def test_gradients_of_weights_are_computed_by_transformer_lens() -> None:
    model = from_hooked_transformer(copy.deepcopy(tiny.model("llama", "plain").tl))
    weight = model.tl.blocks[1].mlp.W_out.requires_grad_(True)
    with passes(model.tl) as seen:
        model.tl(batch()[0], return_type="loss").backward()
    assert seen == ["TransformerLens"] and weight.grad.abs().sum() > 0
    with torch.no_grad(), passes(model.tl) as seen:
        model.tl(batch()[0])
    assert seen == ["fast"]


def test_gradients_of_hook_results_are_computed_by_transformer_lens() -> None:
    tl = pair()[0]
    vector = torch.zeros(tiny.D_MODEL, requires_grad=True, device=tl.cfg.device)
    with tl.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda a, hook: a + vector)]), passes(tl) as seen:
        tl(batch()[0], return_type="loss").backward()
    assert seen == ["TransformerLens"] and vector.grad is not None and vector.grad.abs().sum() > 0


def test_with_gradients_enabled_but_not_required_it_is_fast() -> None:
    plain = pair()[1]
    assert torch.is_grad_enabled() and not any(weight.requires_grad for weight in plain.parameters())
    both(lambda tl: tl.run_with_cache(batch()[0]))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_backward_hooks_for_gradients_are_run_by_transformer_lens() -> None:
    def run(tl: Any) -> Any:
        seen: list[Tensor] = []
        vector = torch.zeros(tiny.D_MODEL, requires_grad=True, device=tl.cfg.device)
        tl.add_hook("hook_embed", lambda a, hook: a + vector)
        tl.add_hook("blocks.1.hook_resid_post", lambda grad, hook: seen.append(grad.clone()), dir="bwd")
        try:
            _, cache = tl.run_with_cache(batch()[0], return_type="loss", incl_bwd=True, names_filter=["hook_embed"])
        finally:
            tl.reset_hooks()
        return dict(cache), seen

    cache, seen = both(run, by="TransformerLens")
    assert "hook_embed_grad" in cache and seen


@pytest.mark.parametrize("stop", [0, 1, -1])
def test_an_early_stop_is_computed_by_transformer_lens(stop: int) -> None:
    both(lambda tl: tl.run_with_cache(batch()[0], stop_at_layer=stop), by="TransformerLens")


@pytest.mark.parametrize("start", [0, 1, -1])
def test_a_later_start_is_computed_by_transformer_lens(start: int) -> None:
    stream = torch.randn(2, 6, tiny.D_MODEL, generator=torch.Generator().manual_seed(0))
    both(lambda tl: tl.run_with_cache(stream, start_at_layer=start), by="TransformerLens")


def test_a_cache_of_transformer_lens_is_extended_by_transformer_lens() -> None:
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    def run(tl: Any) -> Any:
        cache = TransformerLensKeyValueCache.init_cache(tl.cfg, tl.cfg.device, 3)
        tokens, mask = batch()
        tl(tokens, attention_mask=mask, past_kv_cache=cache)
        assert type(cache) is TransformerLensKeyValueCache
        return tl(tokens[:, :1], past_kv_cache=cache), cache.entries[1].past_keys

    both(run, by="TransformerLens")


@pytest.mark.parametrize("architecture", NAMES)
def test_a_frozen_cache_is_read_by_transformer_lens(architecture: str) -> None:
    fast, plain = tiny.model(architecture), tiny.model(architecture, "plain")
    tokens, mask = batch()
    found = []
    for model in (fast, plain):
        cache = model.start(3)
        model.tl(tokens, attention_mask=mask, past_kv_cache=cache)
        cache.freeze()
        with passes(model.tl) as seen:
            found.append([model.tl(tokens[:, :2], past_kv_cache=cache) for _ in range(2)])
        assert seen == ["TransformerLens"] * 2
        assert torch.equal(*found[-1])
    agree(*found)


def test_transformer_lens_continues_a_batch_after_its_cache_was_converted() -> None:
    found = []
    for model in (tiny.model("llama"), tiny.model("llama", "plain")):
        tokens, mask = batch()
        cache = model.start(3)
        model.tl(tokens, attention_mask=mask, past_kv_cache=cache)
        early = model.tl(tokens[:, :1], past_kv_cache=cache, stop_at_layer=tiny.N_LAYERS)
        assert cache.entries[0].past_keys.shape[1] == 13  # converts the cache to TransformerLens's format
        model.keep(cache, torch.tensor([True, False, True]))
        branch = model.branch(cache, [1, 1])
        found.append([early, *(model.tl(tokens[:2, 2:4], past_kv_cache=each) for each in (cache, branch))])
    agree(*found)


def test_a_cache_of_another_model_is_continued_by_transformer_lens() -> None:
    ours, other = tiny.model("llama"), from_hooked_transformer(copy.deepcopy(tiny.model("llama").tl))
    tokens, mask = batch()
    cache, one = ours.start(3), tokens[:, :1]
    ours.tl(tokens, attention_mask=mask, past_kv_cache=cache)
    expected = ours.tl(one, past_kv_cache=copy.deepcopy(cache))
    with passes(other.tl) as seen:
        agree(other.tl(one, past_kv_cache=cache), expected)
    assert seen == ["TransformerLens"]


# Hooks


def _n_hooks(tl: Any) -> dict[str, int]:
    """The number of hooks of each hook point that has some."""
    return {name: len(point.fwd_hooks) for name, point in tl.hook_dict.items() if point.fwd_hooks}


def test_hooks_are_removed_exactly_where_hooked_transformer_removes_them() -> None:
    name, found = "blocks.0.hook_resid_post", []
    for tl in pair():
        log: list[Any] = []

        def logger(word: str, log: list[Any] = log) -> Callable[..., None]:
            return lambda activation, hook: log.append(word)

        try:
            tl.add_hook(name, logger("added"))
            tl.add_perma_hook(name, logger("permanent"))
            with tl.hooks(fwd_hooks=[(name, logger("left"))], reset_hooks_end=False):
                tl.run_with_cache(batch()[0])  # runs one context level deeper, so the hook stays
            log.append(_n_hooks(tl))
            with tl.hooks(fwd_hooks=[(lambda each: each == name, logger("outer"))]):
                log.append(_n_hooks(tl))
                tl.run_with_hooks(batch()[0], fwd_hooks=[(name, logger("inner"))])
                tl.run_with_cache(batch()[0])
                log.append(_n_hooks(tl))
            log.append(_n_hooks(tl))  # removed too: the remaining hook belongs to the level that ended
            tl.run_with_cache(batch()[0], reset_hooks_end=False, names_filter=name)
            log.append(_n_hooks(tl))
            tl.reset_hooks()
            log.append(_n_hooks(tl))
            tl.reset_hooks(including_permanent=True)
            log.append(_n_hooks(tl))
        finally:
            tl.reset_hooks(including_permanent=True)
        found.append(log)
    assert found[0] == found[1]
    assert found[0][-1] == {} and len(found[0]) > 12


def test_cached_activations_include_edits_by_hooks_which_may_run_the_model() -> None:
    def run(tl: Any) -> Any:
        inner: list[Any] = []

        def edit(activation: Tensor, hook: Any) -> Tensor:
            if not inner:
                inner.append({})
                inner[0] = dict(tl.run_with_cache(batch()[0], names_filter=["blocks.0.hook_resid_pre"])[1])
            return activation * 2

        with tl.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", edit)]):
            _, cache = tl.run_with_cache(batch()[0])
        return dict(cache), inner

    both(run)


def test_caching_hooks_work_when_the_caller_adds_them() -> None:
    name = "blocks.1.hook_resid_post"

    def run(tl: Any) -> Any:
        cache, forward, _ = tl.get_caching_hooks(names_filter=name)
        tl.run_with_hooks(batch()[0], fwd_hooks=[*forward, (name, lambda activation, hook: activation * 0)])
        other, more, _ = tl.get_caching_hooks(names_filter=[name])
        more.append((name, lambda activation, hook: activation * 0))
        with tl.hooks(fwd_hooks=more):
            logits = tl(batch()[0])
        return cache, other, logits, dict(tl.run_with_cache(batch()[0], names_filter=name)[1])

    both(run)


def test_an_error_during_a_pass_leaves_no_hooks() -> None:
    tl = pair()[0]

    def fail(activation: Tensor, hook: Any) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), tl.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", fail)]):
        tl.run_with_cache(batch()[0])
    assert not _n_hooks(tl) and not tl._caching_hooks and tl.context_level == 0
    both(lambda tl: tl.run_with_cache(batch()[0]))


# The model


def test_only_plain_hooked_transformers_are_converted_to_fast_ones() -> None:
    from transformer_lens import HookedTransformer

    mine = copy.deepcopy(tiny.model("llama", "plain").tl)
    assert type(mine) is HookedTransformer
    before = mine(batch()[0])
    model = from_hooked_transformer(mine)
    assert model.tl is mine and type(mine) is not HookedTransformer and isinstance(mine, HookedTransformer)
    assert relative(mine(batch()[0]), before) < 1e-5

    class Own(HookedTransformer):
        pass

    own = copy.deepcopy(tiny.model("llama", "plain").tl)
    own.__class__ = Own
    assert type(from_hooked_transformer(own).tl) is Own


def test_copies_and_pickles_compute_with_their_own_weights() -> None:
    tl = copy.deepcopy(pair()[0])
    before = tl(batch()[0])
    for twin in (copy.deepcopy(tl), pickle.loads(pickle.dumps(tl))):
        twin.blocks[1].attn.W_O.data.zero_()
        assert relative(twin(batch()[0]), before) > 1e-3
        assert torch.equal(tl(batch()[0]), before)


def test_a_cache_created_in_inference_mode_can_be_extended_outside_it() -> None:
    model, tokens = tiny.model("llama"), batch()[0]
    cache = model.start(3)
    with torch.inference_mode():
        model.tl(tokens, past_kv_cache=cache)
    one = model.tl(tokens[:, :1], past_kv_cache=cache)
    agree(one[:, 0], model.tl(torch.cat([tokens, tokens[:, :1]], dim=1))[:, -1])
