"""Samples of a prompt: the prompt is read once, and each sample is what a run of its own would give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.test_given_sampling import chi_square_z
from tests.test_out_of_memory import Steps
from tests.test_parity import as_prompt, random_ids, relative
from tlcapture import capture
from tlcapture.errors import InputError
from tlcapture.generation.interventions.intervention import Add
from tlcapture.generation.loop import generate, teacher_force
from tlcapture.generation.outcomes import Generation
from tlcapture.generation.samples import check_names, n_together, sampled
from tlcapture.generation.sampling.next_token import Sampling
from tlcapture.models.loading import Model
from tlcapture.views.attention import attention_hooks
from tlcapture.views.residual import residual_hooks

LENGTHS = (12, 12, 7, 3)
PROMPTS = [as_prompt(random_ids(length, seed=number), str(number)) for number, length in enumerate(LENGTHS)]
SAMPLING = Sampling(1.5, seed=4)
MORE = [("gemma2", "hooked"), ("llama", "plain")] if "hooked" in tiny.ENGINES else []
KINDS = [*(("llama", engine) for engine in tiny.ENGINES), *MORE]


def hooks_of(model: Model) -> list[str]:
    residual = residual_hooks(model.n_layers, model.hook_names, attn_out=True)
    return [*residual, *attention_hooks(model.n_layers, model.hook_names)]


def run(model: Model, samples: int | None, prompts: Sequence[Any] = PROMPTS, **options: Any) -> dict[Any, Generation]:
    options = {"hooks": hooks_of(model), "max_new_tokens": 7, "batch_size": 64, "sampling": SAMPLING, **options}
    found = list(generate(model, sampled(prompts, samples), **options))
    assert all(isinstance(each, Generation) for each in found)
    return {each.prompt.name: each for each in found}


@pytest.mark.parametrize(("kind", "engine"), KINDS)
def test_samples_have_the_activations_of_their_tokens_and_the_first_draws_what_a_run_without_samples_draws(
    kind: str, engine: str
) -> None:
    model = tiny.model(kind, engine)
    alone, found = run(model, None), run(model, 3)
    assert list(found) != list(alone) and set(found) == {f"{name}.s{n}" for name in alone for n in (1, 2, 3)}
    for name, each in alone.items():
        samples = [found[f"{name}.s{n}"] for n in (1, 2, 3)]
        assert samples[0].response_ids == each.response_ids
        assert len({sample.response_ids for sample in samples}) > 1
        n_prompt = len(each.prompt.token_ids)
        for sample in samples:
            expected = teacher_force(model, sample.token_ids, hooks_of(model))
            for hook, activation in sample.cache.items():
                assert relative(activation, expected[hook]) < 1e-4, hook
                whole = (slice(None), slice(n_prompt), slice(n_prompt)) if "pattern" in hook else slice(n_prompt)
                assert torch.equal(activation[whole], each.cache[hook][whole]), hook


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_samples_do_not_depend_on_the_batch_or_on_how_many_there_are(engine: str) -> None:
    model = tiny.model("llama", engine)
    rules = Sampling(1.5, 4, repetition_penalty=1.4, top_p=0.95)
    options: dict[str, Any] = {"hooks": [], "sampling": rules, "max_new_tokens": 4}
    expected = {name: each.response_ids for name, each in run(model, 5, **options).items()}
    for batch_size in (1, 2, 7):
        found = run(model, 5, batch_size=batch_size, **options)
        assert {name: each.response_ids for name, each in found.items()} == expected
    fewer = run(model, 2, **options)
    assert {name: each.response_ids for name, each in fewer.items()} == {name: expected[name] for name in fewer}


def test_a_prompt_is_read_once_for_all_of_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    steps = Steps(monkeypatch, model, lambda *shape: False)
    run(model, 5)
    assert sum(rows for rows, positions in steps.shapes if positions > 1) == len(PROMPTS)
    assert max(rows for rows, positions in steps.shapes if positions == 1) == 5 * len(PROMPTS)


def test_batches_do_not_part_the_samples_of_a_prompt_unless_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    steps = Steps(monkeypatch, model, lambda *shape: False)
    run(model, 5, batch_size=8, max_new_tokens=1, hooks=[])
    assert [rows for rows, _ in steps.shapes] == [1] * len(PROMPTS)
    three = sampled(PROMPTS[:2], 3)
    assert [n_together(three, most) for most in (1, 2, 3, 5, 6, 9)] == [1, 2, 3, 3, 6, 6]
    assert [n_together(PROMPTS, most) for most in (1, 3, 9)] == [1, 3, 4]


@pytest.mark.parametrize("wanted", [["0.s2"], ["1.s1", "3.s3", "3.s1"]])
def test_some_samples_run_in_the_batches_of_all_of_them(wanted: list[str]) -> None:
    model = tiny.model("llama")
    whole, some = run(model, 3, batch_size=6), run(model, 3, batch_size=6, wanted=wanted)
    assert set(some) == set(wanted)
    for name, each in some.items():
        assert all(torch.equal(each.cache[hook], whole[name].cache[hook]) for hook in each.cache)


def test_samples_end_at_stop_texts_of_their_own_and_can_be_steered() -> None:
    model, steer = tiny.model("llama"), [Add(layer=1, addend=torch.linspace(-1, 1, tiny.D_MODEL))]
    alone, found = run(model, None, interventions=steer), run(model, 4, interventions=steer)
    for name, each in alone.items():
        assert found[f"{name}.s1"].response_ids == each.response_ids
    stop = model.tokenizer.decode([found["0.s2"].response_ids[2]])
    stopped = run(model, 4, interventions=steer, sampling=replace(SAMPLING, stop=(stop,)))
    assert len(stopped["0.s2"].response_ids) <= 3 and stopped["0.s2"].stop_reason == "stop_text"
    for name, each in stopped.items():
        assert found[name].response_ids[: len(each.response_ids)] == each.response_ids
        assert (stop in model.tokenizer.decode(list(each.response_ids))) == (each.stop_reason == "stop_text")


@pytest.mark.usefixtures("quick_collections")
@pytest.mark.parametrize("fails_at", [0, 1, 4])
def test_samples_go_on_after_an_out_of_memory_error(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    expected = run(model, 4)
    Steps(monkeypatch, model, lambda number, rows, positions: number == fails_at)
    found = run(model, 4)
    for name, each in expected.items():
        assert found[name].response_ids == each.response_ids
        assert all(relative(found[name].cache[hook], each.cache[hook]) < 1e-5 for hook in each.cache)


def test_the_first_tokens_of_many_samples_have_the_distribution_of_the_model() -> None:
    model, ids = tiny.model("llama"), random_ids(9, seed=2)
    found = run(model, 3000, [as_prompt(ids, "7")], hooks=[], max_new_tokens=1, batch_size=3000)
    counts = Counter(each.response_ids[0] for each in found.values())
    with torch.no_grad():
        logits = tiny.hf_model("llama")(torch.tensor([ids])).logits[0, -1].double()
    expected = (logits / SAMPLING.temperature).softmax(-1) * 3000
    assert chi_square_z(torch.tensor([counts[token] for token in range(len(expected))]), expected) < 4


def test_python_yields_samples_with_their_numbers(tiny_folder: Path) -> None:
    found = list(capture(str(tiny_folder), ["one", "two"], samples=2, max_new_tokens=4, seed=3))
    assert sorted((each.prompt_id, each.sample, each.name) for each in found) == [
        ("1", 1, "1.s1"), ("1", 2, "1.s2"), ("2", 1, "2.s1"), ("2", 2, "2.s2")
    ]  # fmt: skip
    assert all("1.s" in repr(each) or "2.s" in repr(each) for each in found)
    alone = {
        each.prompt_id: each.token_ids for each in capture(found[0].model, ["one", "two"], max_new_tokens=4, seed=3)
    }
    assert {each.prompt_id: each.token_ids for each in found if each.sample == 1} == alone


@pytest.mark.parametrize("samples", [0, -1, True])
def test_a_number_of_samples_that_is_none_is_refused_in_one_line(samples: Any, tiny_folder: Path) -> None:
    with pytest.raises(InputError, match=f"^samples {samples!r}: expected a whole number of at least 1$"):
        next(capture(str(tiny_folder), "x", samples=samples))


def test_a_prompt_with_the_name_of_a_sample_is_refused() -> None:
    with pytest.raises(InputError, match=r"^mine: prompt 7\.s2 has the name of sample 2 of prompt 7: rename one"):
        check_names("mine", [7, "7.s2"], 2)
    check_names("mine", [7, "7.s2"], 1)
    check_names("mine", [7, "7.s2"], None)
