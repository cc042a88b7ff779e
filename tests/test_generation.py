"""Promises 2 and 4: every token has its activations, and no outcome depends on the other prompts of a batch."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests import tiny
from tests.test_parity import as_prompt, random_ids, relative
from tlcapture.errors import InputError, NumericalError, OutOfMemoryError
from tlcapture.generation.batch import Batch, Settings
from tlcapture.generation.interventions.intervention import Add
from tlcapture.generation.loop import continue_from, generate, prefill, teacher_force
from tlcapture.generation.outcomes import Failure, Generation
from tlcapture.generation.padding import left_pad, right_pad
from tlcapture.generation.sampling.next_token import GREEDY, Sampling, choose_tokens, n_numbers
from tlcapture.generation.sampling.noise import GumbelNoise, stream_start
from tlcapture.models.engines.base import StepResult
from tlcapture.models.fast import forward
from tlcapture.models.fast.state import FastState
from tlcapture.models.loading import Model, from_hugging_face
from tlcapture.prompts.chat_template import stop_ids
from tlcapture.prompts.tokenization import TokenizedPrompt
from tlcapture.views.attention import attention_hooks
from tlcapture.views.residual import residual_hooks

PROMPTS = {str(length): random_ids(length, seed=length) for length in (4, 9, 15, 22, 31)}


def outcomes(model: Model, names: list[str], **options: Any) -> dict[str, Generation | Failure]:
    prompts = [as_prompt(PROMPTS[name], name) for name in names]
    hooks = residual_hooks(model.n_layers, model.hook_names)
    return {outcome.prompt.id: outcome for outcome in generate(model, prompts, hooks=hooks, **options)}


def noise(n_rows: int, d_vocab: int) -> torch.Tensor:
    """The noise of a first step, with a stream for each row."""
    starts = [stream_start(0, as_prompt([5], str(row))) for row in range(n_rows)]
    return GumbelNoise(starts, n_numbers(d_vocab), 1, torch.device("cpu")).next()


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_run_with_cache_drives_every_forward_pass_and_its_dict_is_what_is_captured(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dict that each call returns is filled with the number of the call, which is then what is captured."""
    model = tiny.model("llama", engine)
    run_with_cache, n_calls = type(model.tl).run_with_cache, 0

    def numbered(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal n_calls
        output, cache = run_with_cache(self, *args, **options)
        n_calls += 1
        return output, {name: torch.full_like(activation, n_calls) for name, activation in cache.items()}

    monkeypatch.setattr(type(model.tl), "run_with_cache", numbered)
    found = outcomes(model, ["4", "9"], batch_size=2, max_new_tokens=5, sampling=GREEDY)
    generations = [outcome for outcome in found.values() if isinstance(outcome, Generation)]
    assert len(generations) == 2
    assert n_calls == 1 + max(len(generation.response_ids) for generation in generations)
    for outcome in generations:
        n_prompt = len(outcome.prompt.token_ids)
        expected = torch.tensor([1.0] * n_prompt + [2.0 + step for step in range(len(outcome.response_ids))])
        for captured in outcome.cache.values():
            assert torch.equal(captured, expected[:, None].expand_as(captured))


def test_sampled_responses_do_not_depend_on_batch_size_or_order() -> None:
    model = tiny.model("llama")
    names = list(PROMPTS)
    options = {"max_new_tokens": 16, "sampling": Sampling(temperature=1.0, seed=5)}
    alone = outcomes(model, names, batch_size=1, **options)
    for batch_size in (2, 3, 5):
        random.Random(batch_size).shuffle(names)
        together = outcomes(model, names, batch_size=batch_size, **options)
        for name in names:
            assert together[name].response_ids == alone[name].response_ids
            assert together[name].stop_reason == alone[name].stop_reason


@pytest.mark.parametrize("engine", tiny.ENGINES)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_in_16_bits_the_same_batches_give_the_same_bits(engine: str, temperature: float) -> None:
    """Tokens and activations; another batch size may round differently."""
    model = tiny.model("llama", engine, torch.bfloat16)
    options = {"max_new_tokens": 8, "sampling": Sampling(temperature, seed=5), "batch_size": 2}
    first, second = (outcomes(model, list(PROMPTS), **options) for _ in range(2))
    for name, outcome in first.items():
        assert outcome.response_ids == second[name].response_ids
        for hook, activation in outcome.cache.items():
            assert torch.equal(activation, second[name].cache[hook])


def test_noise_differs_between_seeds_prompts_and_prompt_sets() -> None:
    model, ids = tiny.model("llama"), random_ids(10)
    hooks = residual_hooks(model.n_layers, model.hook_names)

    def sample(seed: int, prompt_set: str, name: str) -> tuple[int, ...]:
        prompt = TokenizedPrompt(prompt_set, name, "", "", tuple(ids), None, False)
        sampling = Sampling(temperature=1.5, seed=seed)
        (outcome,) = generate(model, [prompt], hooks=hooks, max_new_tokens=20, sampling=sampling)
        return outcome.response_ids

    drawn = [sample(0, "a", "1"), sample(1, "a", "1"), sample(0, "b", "1"), sample(0, "a", "2")]
    assert len(set(drawn)) == 4
    assert sample(0, "a", "1") == drawn[0]


def test_sampling_follows_the_softmax_of_the_logits() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    draws = choose_tokens(logits.expand(20_000, -1), 0.5, noise(20_000, 4)).tokens
    shares = torch.bincount(draws, minlength=4) / len(draws)
    assert torch.allclose(shares, (logits[0] / 0.5).softmax(0).float(), atol=0.01)


def test_rows_that_stop_leave_the_batch_and_keep_their_last_token() -> None:
    model = tiny.model("llama")
    sizes: list[int] = []

    class Watched(type(model)):  # type: ignore[misc]
        def step(self, tokens: Any, *args: Any, **options: Any) -> StepResult:
            sizes.append(len(tokens))
            return super().step(tokens, *args, **options)

    watched = Watched.__new__(Watched)
    watched.__dict__.update(model.__dict__)
    sampling = Sampling(temperature=3.0, seed=0)  # high enough for stop ids to be sampled
    found = outcomes(watched, list(PROMPTS), batch_size=5, max_new_tokens=120, sampling=sampling)
    stops = stop_ids(model.tokenizer, model.generation_config, chat_template=False)
    reasons = {outcome.stop_reason for outcome in found.values()}
    assert "stop_token" in reasons
    assert sizes[0] == 5
    assert sorted(sizes, reverse=True) == sizes
    assert sizes[-1] < 5
    for outcome in found.values():
        assert outcome.cache["blocks.0.hook_resid_pre"].shape[0] == len(outcome.token_ids)
        assert not stops & set(outcome.response_ids[:-1])
        assert (outcome.stop_reason == "stop_token") == (outcome.response_ids[-1] in stops)


def test_activations_of_a_run_equal_one_pass_over_its_tokens() -> None:
    model = tiny.model("qwen2")
    found = outcomes(model, list(PROMPTS), batch_size=5, max_new_tokens=10)
    for outcome in found.values():
        recomputed = teacher_force(model, outcome.token_ids, list(outcome.cache))
        for name, activation in outcome.cache.items():
            assert torch.allclose(activation, recomputed[name], atol=2e-4, rtol=1e-4)


def test_captured_tensors_share_no_memory_with_another_prompt() -> None:
    found = outcomes(tiny.model("llama"), ["4", "9"], batch_size=2, max_new_tokens=3)
    storages = {
        name: {tensor.untyped_storage().data_ptr() for tensor in outcome.cache.values()}
        for name, outcome in found.items()
    }
    assert not storages["4"] & storages["9"]


def test_no_new_tokens_captures_the_prompt_alone() -> None:
    (outcome,) = outcomes(tiny.model("llama"), ["9"], max_new_tokens=0).values()
    assert outcome.response_ids == ()
    assert outcome.cache["blocks.0.hook_resid_pre"].shape[0] == 9


def test_only_a_prompt_that_does_not_fit_the_context_fails() -> None:
    model = tiny.model("llama")
    prompts = [as_prompt(random_ids(250), "long"), as_prompt(random_ids(5), "short")]
    hooks = residual_hooks(model.n_layers, model.hook_names)
    found = {outcome.prompt.id: outcome for outcome in generate(model, prompts, hooks=hooks, max_new_tokens=10)}
    assert isinstance(found["short"], Generation)
    assert isinstance(found["long"], Failure)
    assert found["long"].error is InputError
    assert "250 prompt tokens and 10 new ones are more than the model's context of 256" in found["long"].reason


@pytest.mark.usefixtures("quick_collections")
def test_out_of_memory_halves_the_batch_and_fails_only_prompts_that_fit_in_no_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.model("llama")
    original, sizes = type(model).step, []

    def step(self: Model, tokens: Any, *args: Any, **options: Any) -> StepResult:
        sizes.append(len(tokens))
        if tokens.shape[0] > 2 or tokens.shape[1] > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, tokens, *args, **options)

    monkeypatch.setattr(type(model), "step", step)
    found = outcomes(model, list(PROMPTS), batch_size=5, max_new_tokens=4, sampling=GREEDY)
    monkeypatch.undo()
    assert isinstance(found["31"], Failure)
    assert "out of memory" in found["31"].reason
    assert found["31"].error is OutOfMemoryError
    assert sizes[0] == 5
    expected = outcomes(model, ["4", "9", "15", "22"], batch_size=1, max_new_tokens=4, sampling=GREEDY)
    for name, outcome in expected.items():
        assert found[name].response_ids == outcome.response_ids


def test_tokens_of_prompts_that_go_on_after_an_error_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, counted, steps = tiny.model("llama"), [], 0
    original = type(model).step

    def step(self: Model, *args: Any, **options: Any) -> StepResult:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, *args, **options)

    monkeypatch.setattr(type(model), "step", step)
    options: Any = {"hooks": [], "max_new_tokens": 6, "sampling": GREEDY, "batch_size": 2}
    prompts = [as_prompt(PROMPTS["9"], "9"), as_prompt(PROMPTS["4"], "4")]
    found = list(generate(model, prompts, on_tokens=counted.append, **options))
    assert min(counted) >= 0
    assert sum(counted) == sum(len(each.response_ids) for each in found if isinstance(each, Generation))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-307, 5e-324])
def test_a_temperature_near_zero_chooses_the_likeliest_token(temperature: float) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 10
    assert choose_tokens(logits, temperature, noise(3, 50)).tokens.tolist() == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("name", ["blocks.1.attn.hook_attn_scores", "ln_final.hook_scale", "unembed.hook_out"])
def test_hooks_without_one_row_per_token_are_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is not captured: expected"):
        list(generate(tiny.model("llama"), [as_prompt(PROMPTS["4"], "4")], hooks=[name]))


def test_nan_logits_fail_only_their_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    original = type(model).step
    steps = 0

    def step(self: Model, tokens: Any, *args: Any, **options: Any) -> StepResult:
        nonlocal steps
        steps += 1
        result = original(self, tokens, *args, **options)
        if steps == 3 and result.logits is not None:
            result.logits[0] = float("nan")
        return result

    monkeypatch.setattr(type(model), "step", step)
    found = outcomes(model, ["9", "4"], batch_size=2, max_new_tokens=6, sampling=GREEDY)
    monkeypatch.undo()
    assert isinstance(found["9"], Failure)
    assert "NaN or inf at token 11" in found["9"].reason
    assert found["9"].error is NumericalError
    alone = outcomes(model, ["4"], max_new_tokens=6, sampling=GREEDY)
    assert found["4"].response_ids == alone["4"].response_ids


def test_other_errors_of_the_model_are_not_treated_as_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    monkeypatch.setattr(type(model), "step", lambda *args, **options: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        outcomes(model, ["4"], max_new_tokens=2)


@tiny.needs_hooked
def test_prompts_run_in_parts_give_the_activations_of_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny.hf_model("llama")
    model = from_hugging_face(hf, tiny.tokenizer(), name="llama", engine="hooked", fast=True)
    prompts = [as_prompt(random_ids(length, seed=length), str(length)) for length in (30, 29, 12, 5, 4)]
    hooks = [*residual_hooks(model.n_layers, model.hook_names), *attention_hooks(model.n_layers, model.hook_names)]
    options: Any = {"hooks": hooks, "max_new_tokens": 6, "sampling": GREEDY, "batch_size": 5}
    at_once = {each.prompt.id: each for each in generate(model, prompts, **options)}
    monkeypatch.setattr(forward, "_MAX_POSITIONS", {"cpu": 24})
    reserve = FastState.reserve

    def reserve_poisoned(self: FastState, *args: Any) -> torch.Tensor:
        fresh = self.store is None
        return reserve(self, *args).fill_(torch.nan) if fresh else reserve(self, *args)

    monkeypatch.setattr(FastState, "reserve", reserve_poisoned)
    in_parts = {each.prompt.id: each for each in generate(model, prompts, **options)}
    tokens = torch.ones(5, 30, dtype=torch.long)
    steps = list(model.prompt_steps(tokens, torch.ones_like(tokens), model.start(5), frozenset()))
    assert len(steps) == 5 and all(len(step.logits) == 1 for _, step in steps)
    assert at_once.keys() == in_parts.keys()
    for name, generation in at_once.items():
        assert generation.response_ids == in_parts[name].response_ids
        for hook, activation in generation.cache.items():
            assert relative(activation, in_parts[name].cache[hook]) < 1e-5


def test_prompts_go_to_the_device_together_before_their_parts_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, each copy from main memory waits for the part before it."""
    model, found = tiny.model("llama"), []

    def prompt_steps(tokens: torch.Tensor, mask: torch.Tensor, state: Any, hooks: Any) -> Any:
        found.extend((tokens.device.type, mask.device.type))
        raise OutOfMemoryError("enough was seen")

    monkeypatch.setattr(model, "prompt_steps", prompt_steps)
    monkeypatch.setattr(model, "reserve", lambda state, n_positions: None)
    monkeypatch.setattr(model, "device", torch.device("meta"))
    with pytest.raises(OutOfMemoryError, match="enough was seen"):
        list(Batch(model, [as_prompt(random_ids(3))], Settings()).run(lambda indices: None))
    assert found == ["meta", "meta"]


def test_wanted_prompts_have_bit_identical_outcomes_when_all_are_wanted() -> None:
    model = tiny.model("llama")
    prompts = [as_prompt(random_ids(length, seed=length), str(length)) for length in (30, 29, 12, 5, 4)]
    hooks = [*residual_hooks(model.n_layers, model.hook_names), *attention_hooks(model.n_layers, model.hook_names)]
    counted: list[int] = []
    options: Any = {"hooks": hooks, "max_new_tokens": 6, "sampling": GREEDY, "batch_size": 2}
    everything = {each.prompt.id: each for each in generate(model, prompts, **options)}
    some = list(generate(model, prompts, wanted={"29", "4"}, on_tokens=counted.append, **options))
    assert sorted(each.prompt.id for each in some) == ["29", "4"]
    for each in some:
        assert each.response_ids == everything[each.prompt.id].response_ids
        for hook, activation in each.cache.items():
            assert torch.equal(activation, everything[each.prompt.id].cache[hook])
    assert sum(counted) == sum(len(each.response_ids) for each in some)


def test_batches_without_a_wanted_prompt_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    prompts = [as_prompt(random_ids(length, seed=length), str(length)) for length in (9, 8, 7, 6)]
    started: list[int] = []
    start = type(model).start
    monkeypatch.setattr(type(model), "start", lambda self, size: started.append(size) or start(self, size))
    (only,) = generate(model, prompts, hooks=[], wanted={"7"}, max_new_tokens=1, batch_size=2)
    assert only.prompt.id == "7"
    assert started == [2]


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_interventions_act_from_the_last_prompt_token_on(engine: str) -> None:
    model, addend = tiny.model("llama", engine), torch.linspace(-2, 2, tiny.D_MODEL)
    point = "blocks.1.hook_resid_post"
    options: Any = {"hooks": [point], "max_new_tokens": 5, "sampling": GREEDY, "batch_size": 3}
    prompts = [as_prompt(PROMPTS[name], name) for name in ("22", "9", "4")]
    for outcome in generate(model, prompts, interventions=[Add(layer=1, addend=addend)], **options):
        # residual_out of layer 1 at a token does not depend on what was added to it at earlier tokens.
        plain, steered = teacher_force(model, outcome.token_ids, [point])[point], outcome.cache[point]
        n_before = len(outcome.prompt.token_ids) - 1
        assert torch.allclose(steered[:n_before], plain[:n_before], atol=1e-4)
        assert torch.allclose(steered[n_before:], plain[n_before:] + addend, atol=1e-4)


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_a_prefilled_state_continues_as_its_prompts_do(engine: str) -> None:
    model, prompts = tiny.model("llama", engine), [as_prompt(PROMPTS[name], name) for name in ("4", "22", "9")]
    state = prefill(model, prompts)
    for interventions in ([], [Add(layer=1, addend=torch.linspace(-2, 2, tiny.D_MODEL))]):
        options: Any = {"max_new_tokens": 8, "sampling": Sampling(2.0, seed=3), "interventions": interventions}
        whole = {each.prompt.id: each for each in generate(model, prompts, hooks=[], **options)}
        continued = continue_from(model, model.branch(state, range(3)), prompts, **options)
        assert [each.prompt.id for each in continued] == ["4", "22", "9"]
        for each in continued:
            assert (each.response_ids, each.stop_reason) == (
                whole[each.prompt.id].response_ids,
                whole[each.prompt.id].stop_reason,
            )


def test_sequences_are_padded_on_the_side_asked_for() -> None:
    tokens, mask = left_pad([[5, 6, 7], [8], []])
    assert tokens.tolist() == [[5, 6, 7], [0, 0, 8], [0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    tokens, mask = right_pad([[5, 6, 7], [8], []])
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]


def test_a_failed_prompts_tokens_are_not_taken_back_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, counted, steps = tiny.model("llama"), [], 0
    original = type(model).step

    def step(self: Model, *args: Any, **options: Any) -> StepResult:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        result = original(self, *args, **options)
        if steps == 3:
            result.logits[0] = float("nan")
        return result

    monkeypatch.setattr(type(model), "step", step)
    options: Any = {"hooks": [], "max_new_tokens": 6, "sampling": GREEDY, "batch_size": 2}
    prompts = [as_prompt(PROMPTS["9"], "9"), as_prompt(PROMPTS["4"], "4")]
    failed, generated = generate(model, prompts, on_tokens=counted.append, **options)
    assert isinstance(failed, Failure) and isinstance(generated, Generation)
    tokens_of_failed = 2
    assert sum(counted) == tokens_of_failed + len(generated.response_ids)


def test_an_outcome_is_kept_when_memory_runs_out_while_the_next_token_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, counted, calls = tiny.model("llama"), [], 0

    def choose(logits: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if calls == 3:
            logits[0] = float("nan")
        return choose_tokens(logits, *args)

    monkeypatch.setattr("tlcapture.generation.batch.choose_tokens", choose)
    options: Any = {"hooks": [], "max_new_tokens": 6, "sampling": GREEDY, "batch_size": 2}
    prompts = [as_prompt(PROMPTS["9"], "9"), as_prompt(PROMPTS["4"], "4")]
    failed, generated = generate(model, prompts, on_tokens=counted.append, **options)
    assert isinstance(failed, Failure) and failed.error is NumericalError
    assert isinstance(generated, Generation) and len(generated.response_ids) == 6
    assert sum(counted) == 2 + 6 and min(counted) > 0, "no token is counted twice or taken back"
