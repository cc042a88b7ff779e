"""Steps in fixed buffers, run or replayed, equal steps whose keys grow; a replay overwrites the last step's tensors."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.fast.test_forward import steps, steps_of_transformer_lens
from tests.test_parity import as_prompt, random_ids, relative
from tlcapture.generation.interventions.intervention import Add, Limit, Remove
from tlcapture.generation.interventions.where import Where
from tlcapture.generation.loop import generate, teacher_force
from tlcapture.generation.outcomes import Generation
from tlcapture.generation.samples import sampled
from tlcapture.generation.sampling.next_token import GREEDY, Sampling
from tlcapture.models.fast import decoder, layers, recording
from tlcapture.models.loading import Model, from_hooked_transformer, from_hugging_face
from tlcapture.views.attention import attention_hooks
from tlcapture.views.residual import residual_hooks

pytestmark = tiny.needs_hooked

LAST = "blocks.2.hook_resid_post"
LENGTHS = (31, 22, 15, 9, 4)


class Tape:
    """Stands in for CUDA graphs: a replay runs the call again and writes what it returns into the first tensors."""

    def __init__(self) -> None:
        self.n_recorded = self.n_replayed = 0

    def run(self, call: Callable[[], Any]) -> Any:
        return call()

    def record(self, call: Callable[[], Any]) -> Any:
        self.n_recorded += 1
        return Recorded(self, call)


class Recorded:
    def __init__(self, tape: Tape, call: Callable[[], Any]):
        self.tape, self.call, self.result, self.holds = tape, call, call(), None

    def replay(self) -> Any:
        self.tape.n_replayed += 1
        (logits, kept), (new_logits, new_kept) = self.result, self.call()
        logits.copy_(new_logits)
        for name, activation in new_kept.items():
            kept[name].copy_(activation)
        return logits, kept


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Steps run in fixed buffers and are replayed on any device; returns the tapes of the decoders made since."""
    made: list[Tape] = []
    init = decoder.Decoder.__init__

    def with_tape(self: Any, *args: Any) -> None:
        init(self, *args)
        made.append(Tape())
        self._tape = made[-1]

    monkeypatch.setattr(decoder, "FIXED_ON", {"cpu", "cuda"})
    monkeypatch.setattr(layers, "JOINED_ON", {"cpu", "cuda"})
    monkeypatch.setattr(decoder.Decoder, "__init__", with_tape)
    return made


@pytest.fixture(params=["run", "replayed"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Steps run in fixed buffers on any device: `run`, or `replayed`."""
    if request.param == "replayed":
        request.getfixturevalue("tapes")
    monkeypatch.setattr(decoder, "FIXED_ON", {"cpu", "cuda"})
    monkeypatch.setattr(layers, "JOINED_ON", {"cpu", "cuda"})
    monkeypatch.setattr(decoder.Decoder, "records", False)
    return str(request.param)


def model_of(name: str = "llama") -> Model:
    """A tiny model without buffers of earlier tests."""
    model: Model = tiny.model(name)
    model.release()
    return model


def growing(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Any:
    """What a call returns while keys and values grow, as on a CPU."""
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "FIXED_ON", set())
        return call()


def generated(
    model: Model, lengths: tuple[int, ...] = LENGTHS, n_new: int = 20, samples: int | None = None, **options: Any
) -> dict[str, Any]:
    """Generations of greedy responses by the length of the prompt, or the name of the sample."""
    prompts = sampled([as_prompt(random_ids(length, seed=length), str(length)) for length in lengths], samples)
    hooks = [*residual_hooks(model.n_layers, model.hook_names), *attention_hooks(model.n_layers, model.hook_names)]
    defaults = {"batch_size": len(prompts), "max_new_tokens": n_new, "sampling": GREEDY, "hooks": hooks}
    found = {each.prompt.name: each for each in generate(model, prompts, **{**defaults, **options})}
    assert all(isinstance(each, Generation) for each in found.values())
    return found


def check_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The same tokens, and activations equal to rounding."""
    assert ours.keys() == theirs.keys()
    for name, generation in ours.items():
        assert generation.token_ids == theirs[name].token_ids
        for hook, activation in generation.cache.items():
            assert relative(activation, theirs[name].cache[hook]) < 1e-4, hook


@pytest.mark.parametrize("architecture", [name for name in tiny.CONFIGS if name != "olmo2"])
def test_every_hook_point_of_a_step_equals_transformer_lens(architecture: str, kind: str) -> None:
    model, (hooks, expected) = model_of(architecture), steps_of_transformer_lens(architecture)
    for ours, theirs in zip(steps(model, hooks, reserve=True), expected, strict=True):
        assert ours.keys() == theirs.keys() == hooks | {"logits"}
        for name in ours:
            finite = theirs[name].isfinite()
            assert ours[name].shape == theirs[name].shape, name
            assert torch.equal(ours[name].isfinite(), finite), name
            assert relative(ours[name][finite], theirs[name][finite]) < 1e-4, name


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "phi3"])
def test_rows_that_end_early_leave_tokens_and_activations_as_they_are(
    architecture: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options = model_of(architecture), {"sampling": Sampling(temperature=1.5)}
    alone = growing(monkeypatch, lambda: generated(model, batch_size=1, **options))
    responses = [each.response_ids for each in alone.values()]
    stops = {response[min(place, len(response) - 1)] for place, response in zip((2, 5, 9, 14), responses, strict=False)}
    monkeypatch.setattr("tlcapture.generation.batch.stop_ids", lambda *args, **options: frozenset(stops))
    expected = growing(monkeypatch, lambda: generated(model, batch_size=1, **options))
    assert len({len(each.response_ids) for each in expected.values()}) > 2
    check_equal(generated(model, **options), expected)
    check_equal(generated(model, **{**options, "batch_size": 2}), expected)


def test_samples_of_prompts_decode_in_the_buffers_too(monkeypatch: pytest.MonkeyPatch, tapes: list[Tape]) -> None:
    model, options = model_of("gemma2"), {"samples": 3, "sampling": Sampling(1.5, top_p=0.9, repetition_penalty=1.2)}
    expected = growing(monkeypatch, lambda: generated(model, **options))
    check_equal(generated(model, **options), expected)
    assert tapes[-1].n_replayed > 10


def test_ended_rows_idle_until_half_do(monkeypatch: pytest.MonkeyPatch, tapes: list[Tape]) -> None:
    model, sizes = model_of(), []
    run = type(model)._run

    def watched(self: Any, tokens: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(len(tokens))
        return run(self, tokens, *args, **options)

    monkeypatch.setattr(type(model), "_run", watched)
    tokens = torch.tensor([random_ids(6, seed=row) for row in range(10)])
    state = model.start(10)
    model.reserve(state, 40)
    model.step(tokens, torch.ones_like(tokens), state, frozenset(), want_logits=False)
    for rows in (10, 9, 6, 5, 3, 1):
        model.keep(state, torch.arange(len(state.previous_attention_mask)) < rows)
        del sizes[:]
        step = model.step(tokens[:rows, :1], torch.ones(rows, 1, dtype=torch.long), state, {LAST}, want_logits=True)
        assert len(step.cache[LAST]) == rows and step.logits is not None and len(step.logits) == rows
        assert {10: 10, 9: 10, 6: 10, 5: 8, 3: 4, 1: 1}[rows] == max(sizes, default=10)


def test_the_number_of_keys_read_follows_the_length(monkeypatch: pytest.MonkeyPatch, tapes: list[Tape]) -> None:
    monkeypatch.setattr(decoder, "_KEYS", 8)
    monkeypatch.setattr(decoder, "_CAPACITY", 8)
    model = model_of("gemma2")
    found = generated(model, (12, 7), n_new=30)
    assert tapes[0].n_recorded == 5  # 16, 24, 32, 40 and 48 keys
    check_equal(found, growing(monkeypatch, lambda: generated(model, (12, 7), n_new=30)))


def test_later_batches_replay_the_steps_of_the_first(monkeypatch: pytest.MonkeyPatch, tapes: list[Tape]) -> None:
    model = model_of()
    prompts = (12, 11, 10, 9, 8, 7)
    found = generated(model, prompts, batch_size=2)
    assert len(tapes) == 1 and tapes[0].n_recorded == 1
    check_equal(found, growing(monkeypatch, lambda: generated(model, prompts, batch_size=1)))


def test_two_batches_at_once_have_buffers_of_their_own(monkeypatch: pytest.MonkeyPatch, tapes: list[Tape]) -> None:
    model, options = model_of(), {"hooks": [LAST], "sampling": GREEDY, "batch_size": 2, "max_new_tokens": 12}
    prompts = [[as_prompt(random_ids(9, seed=seed), str(seed)) for seed in seeds] for seeds in ((1, 2), (3, 4))]
    expected = growing(monkeypatch, lambda: [list(generate(model, each, **options)) for each in prompts])
    states = []
    for batch in prompts:
        tokens = torch.tensor([prompt.token_ids for prompt in batch])
        states.append(model.start(2))
        model.reserve(states[-1], 21)
        model.step(tokens, torch.ones_like(tokens), states[-1], {LAST}, want_logits=True)
    for number in range(12):
        for state, outcomes in zip(states, expected, strict=True):
            new = torch.tensor([[outcome.response_ids[number]] for outcome in outcomes])
            step = model.step(new, torch.ones_like(new), state, {LAST}, want_logits=True)
            for row, outcome in enumerate(outcomes):
                assert relative(step.cache[LAST][row, 0].cpu(), outcome.cache[LAST][9 + number]) < 1e-4
    assert len(tapes) == 2


def test_what_an_earlier_batch_left_does_not_reach_a_later_one(
    monkeypatch: pytest.MonkeyPatch, tapes: list[Tape]
) -> None:
    model = model_of()
    generated(model, (40, 39))
    model._decoder._store.fill_(torch.nan)
    check_equal(generated(model, (12, 5)), growing(monkeypatch, lambda: generated(model, (12, 5))))
    assert len(tapes) == 1


def test_steering_and_hooks_are_run_for_the_rows_of_the_batch(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model, rows = model_of(), []
    steer = Add(layer=1, addend=torch.linspace(-1, 1, tiny.D_MODEL))

    def see(activation: Tensor, hook: Any) -> None:
        rows.append(len(activation))

    def call() -> dict[str, Any]:
        return generated(model, interventions=[steer])

    check_equal(call(), growing(monkeypatch, call))
    with model.tl.hooks(fwd_hooks=[(LAST, see)]):
        found = generated(model, (12, 9, 5))
    assert len(rows) == 1 + max(len(each.response_ids) for each in found.values()) and set(rows) <= {1, 2, 3}


def test_whoever_replaces_run_with_cache_sees_every_step(monkeypatch: pytest.MonkeyPatch, tapes: list[Tape]) -> None:
    model, calls = model_of(), []
    run_with_cache = type(model.tl).run_with_cache

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        return run_with_cache(self, *args, **options)

    monkeypatch.setattr(type(model.tl), "run_with_cache", watched)
    found = generated(model, (12, 9))
    assert len(calls) == 1 + max(len(each.response_ids) for each in found.values())
    assert not tapes[0].n_recorded


def test_weights_edited_in_place_are_seen_and_replaced_ones_recorded_anew(tapes: list[Tape]) -> None:
    plain = copy.deepcopy(tiny.model("qwen2", "plain").tl)
    model = from_hooked_transformer(copy.deepcopy(plain))

    def check() -> None:
        theirs = steps(tiny_model(plain), {LAST})
        for ours, other in zip(steps(model, {LAST}, reserve=True), theirs, strict=True):
            assert relative(ours[LAST], other[LAST]) < 1e-4

    check()
    for tl in (model.tl, plain):
        tl.blocks[1].attn.W_Q.data.mul_(2)
        tl.blocks[2].mlp.W_in.data.mul_(-1)
        tl.blocks[0].attn.b_Q.data.add_(0.5)
    check()
    for tl in (model.tl, plain):
        tl.blocks[1].mlp.W_out.data = tl.blocks[1].mlp.W_out.data * 3
    check()
    for tl in (model.tl, plain):
        tl.blocks[0].attn.W_O = torch.nn.Parameter(tl.blocks[0].attn.W_O.data * 0.1)
    check()


def tiny_model(tl: Any) -> Model:
    """A model of TransformerLens alone."""
    from tlcapture.models.engines.hooked import HookedModel

    return HookedModel(tl, tl.tokenizer, None, None, "tiny", "tiny")


def test_a_model_that_cannot_be_recorded_is_run_with_one_line(
    monkeypatch: pytest.MonkeyPatch, tapes: list[Tape], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Any, call: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(Tape, "record", fail)
    monkeypatch.setattr(decoder.Decoder, "records", True)
    model = model_of()
    with caplog.at_level(logging.WARNING):
        found = generated(model, (12, 9))
    assert [record.getMessage() for record in caplog.records] == [
        "decode steps are run, not replayed: operation not permitted when stream is capturing"
    ]
    assert not decoder.Decoder.records
    check_equal(found, growing(monkeypatch, lambda: generated(model, (12, 9))))


def test_a_batch_begun_in_inference_mode_goes_on_outside_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    with torch.inference_mode():
        generated(model, (12, 9))
    check_equal(generated(model, (12, 9)), growing(monkeypatch, lambda: generated(model, (12, 9))))


def test_other_calls_may_extend_a_batch_in_between(kind: str) -> None:
    model, plain = model_of("gemma2"), tiny.model("gemma2", "plain")
    tokens = torch.tensor([random_ids(30, seed=row) for row in range(2)])
    state, one = model.start(2), torch.ones(2, 1, dtype=torch.long)
    model.reserve(state, 30)
    model.step(tokens[:, :10], torch.ones(2, 10, dtype=torch.long), state, frozenset(), want_logits=False)
    for position in range(10, 20):
        model.step(tokens[:, position : position + 1], one, state, frozenset(), want_logits=False)
    with torch.no_grad():
        model.tl(tokens[:, 20:24], attention_mask=torch.ones(2, 4, dtype=torch.long), past_kv_cache=state)
    for position in range(24, 30):
        step = model.step(tokens[:, position : position + 1], one, state, {LAST}, want_logits=True)
    branch = model.branch(state, [1, 0])
    with torch.no_grad():
        _, whole = plain.tl.run_with_cache(tokens, names_filter=LAST)
    assert relative(step.cache[LAST][:, 0], whole[LAST][:, -1]) < 1e-4
    more = model.step(tokens[:, :1], one, branch, {LAST}, want_logits=True)
    again = model.step(tokens[:, :1].flip(0), one, state, {LAST}, want_logits=True)  # beyond what was reserved
    assert relative(more.cache[LAST].flip(0), again.cache[LAST]) < 1e-4


def test_the_error_in_half_precision_is_close_to_that_of_growing_keys(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = from_hugging_face(
        tiny.hf_model("gemma2", torch.bfloat16), tiny.tokenizer(), name="half", engine="hooked", device=tiny.DEVICE
    )
    names = set(residual_hooks(half.n_layers, half.hook_names))
    truth = steps(tiny.model("gemma2", "plain"), names)
    fixed, grown = steps(half, names, reserve=True), growing(monkeypatch, lambda: steps(half, names))
    for ours, theirs, true in zip(fixed, grown, truth, strict=True):
        for name in names | {"logits"}:
            error, other = ((each[name].float() - true[name]).norm() for each in (ours, theirs))
            assert error < 1.25 * other + 1e-3 * true[name].norm(), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "qwen3"])
def test_recorded_steps_equal_run_ones_and_nothing_waits_for_the_device(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(architecture)
    hooks = frozenset(residual_hooks(model.n_layers, model.hook_names))
    prompt = torch.tensor([random_ids(20, seed=row) for row in range(4)])
    mask = torch.ones_like(prompt)
    mask[1, :9] = 0
    new = torch.tensor([random_ids(12, seed=9 + row) for row in range(4)], device=model.device)
    one = torch.ones(4, 1, dtype=torch.long, device=model.device)

    def decoded(*, record: bool) -> list[Tensor]:
        monkeypatch.setattr(decoder.Decoder, "records", record)
        model.release()
        state = model.start(4)
        model.reserve(state, 32)
        for _ in model.prompt_steps(prompt, mask, state, hooks):
            pass
        found = []
        for position in range(12):
            torch.cuda.set_sync_debug_mode("error" if position > 2 else "default")
            try:
                step = model.step(new[:, position : position + 1], one, state, hooks, want_logits=True)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert step.logits is not None
            found += [step.logits.clone(), *(step.cache[name].clone() for name in sorted(hooks))]
        assert (len(model._decoder._recorded) == 1) == record
        return found

    for ours, theirs in zip(decoded(record=True), decoded(record=False), strict=True):
        assert relative(ours, theirs) < 1e-5


def test_steps_of_interventions_that_are_gone_are_forgotten(tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    monkeypatch.setattr(decoder, "_MOST_RECORDED", 2)
    for n_new in (1, 2) * 4:  # as many steps
        generated(model, (5,), n_new, interventions=[Add(layer=1, addend=torch.ones(tiny.D_MODEL))])
    buffers = model._decoder
    assert tapes[0].n_recorded == 4
    assert len(buffers._recorded) == 2 and len(buffers._seen) <= 2


@pytest.mark.parametrize("point", ["hook_pattern", "hook_attn_scores", "hook_rot_k"])
def test_a_hook_sees_the_keys_so_far_and_none_to_come(point: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last key of a pattern is the new token itself, as in TransformerLens."""
    model, shapes = model_of(), []

    def change(activation: Tensor, hook: Any) -> Tensor:
        shapes.append(activation.shape)
        changed = activation.clone()
        changed[:, -1] *= 0.5  # of a rotated key
        changed[..., -1] *= 0.5  # of a pattern
        return changed

    def call() -> dict[str, Any]:
        with model.tl.hooks(fwd_hooks=[(f"blocks.0.attn.{point}", change)]):
            return generated(model, (12, 9), n_new=5)

    found, seen = call(), list(shapes)
    shapes.clear()
    check_equal(found, growing(monkeypatch, call))
    assert seen == shapes


def test_copies_of_a_model_and_of_a_state_go_on_without_its_buffers(tapes: list[Tape]) -> None:
    model = model_of()
    tokens, one = torch.tensor([random_ids(12)]), torch.ones(1, 1, dtype=torch.long)
    state = model.start(1)
    model.reserve(state, 20)
    model.step(tokens[:, :9], torch.ones(1, 9, dtype=torch.long), state, frozenset(), want_logits=False)
    model.step(tokens[:, 9:10], one, state, frozenset(), want_logits=False)
    branch = copy.deepcopy(state)
    assert copy.deepcopy(model)._decoder is None
    for position in (10, 11):
        found = [
            model.step(tokens[:, position : position + 1], one, each, {LAST}, want_logits=True).cache[LAST].clone()
            for each in (state, branch)
        ]
        assert relative(*found) < 1e-5
    assert len(tapes) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_no_other_thread_gets_the_stream_on_which_steps_are_recorded() -> None:
    """torch has 32 streams of a priority, and gives each to several that ask."""
    device = torch.device("cuda", 0)
    tape = recording.Tape(device)
    assert tape._stream.cuda_stream not in {torch.cuda.Stream(device).cuda_stream for _ in range(64)}


@pytest.fixture
def faithful_tapes(monkeypatch: pytest.MonkeyPatch, tapes: list[Tape]) -> list[Tape]:
    """Replays do what was recorded, with the interventions that were on then, as a CUDA graph does."""
    init = Recorded.__init__

    def recorded(self: Recorded, tape: Tape, call: Callable[[], Any]) -> None:
        tl = tiny.model("llama").tl
        on = tl._recordable

        def call_with_what_was_on() -> Any:
            now, tl._recordable = tl._recordable, on
            try:
                return call()
            finally:
                tl._recordable = now

        init(self, tape, call_with_what_was_on)

    monkeypatch.setattr(Recorded, "__init__", recorded)
    return tapes


def test_recorded_steps_hold_interventions_and_are_told_apart_by_them(
    monkeypatch: pytest.MonkeyPatch, faithful_tapes: list[Tape]
) -> None:
    model, unit = model_of(), torch.nn.functional.normalize(torch.linspace(-1, 2, tiny.D_MODEL), dim=0)
    changes = {
        "none": [],
        "added": [Add(layer=1, addend=4 * unit)],
        "added at first": [Add(layer=1, addend=4 * unit, where=Where("first", 5))],
        "removed": [Remove(layer=layer, direction=unit) for layer in range(3)],
        "limited": [Limit(layer=1, direction=unit, most=-0.5), Add(layer=2, addend=-3 * unit)],
    }
    for number, name in enumerate([*changes, *changes]):
        check_equal(
            generated(model, interventions=changes[name]),
            growing(monkeypatch, lambda name=name: generated(model, interventions=changes[name])),
        )
        model.release() if number % 2 else None
    assert sum(tape.n_recorded for tape in faithful_tapes) >= len(changes)
    assert sum(tape.n_replayed for tape in faithful_tapes) > 10 * len(changes)


def test_recorded_steps_follow_which_rows_are_thinking(
    monkeypatch: pytest.MonkeyPatch, faithful_tapes: list[Tape]
) -> None:
    model = model_of()
    plain = growing(monkeypatch, lambda: generated(model))
    common = torch.tensor([each.response_ids for each in plain.values() if len(each.response_ids) == 20]).flatten()
    opening, closing = common.bincount().topk(2).indices.tolist()
    monkeypatch.setattr(
        "tlcapture.generation.interventions.thinking_rows.marker_tokens", lambda tokenizer, **_: (opening, closing)
    )
    change = [Add(layer=1, addend=torch.linspace(-1, 1, tiny.D_MODEL), where=Where("thinking"))]
    found = generated(model, interventions=change)
    check_equal(found, growing(monkeypatch, lambda: generated(model, interventions=change)))
    assert faithful_tapes[0].n_replayed > 5
    point, n_within = "blocks.1.hook_resid_post", 0
    for outcome in found.values():
        ids, n_prompt = outcome.response_ids, len(outcome.prompt.token_ids)
        within, inside = [False] * n_prompt, False
        for token in ids:
            within.append(inside and token != closing)
            inside = (inside and token != closing) or token == opening
        n_within += sum(within)
        before = teacher_force(model, outcome.token_ids, [point])[point]
        expected = before + torch.tensor(within)[:, None] * torch.linspace(-1, 1, tiny.D_MODEL)
        assert relative(outcome.cache[point], expected) < 1e-4
    assert n_within
