"""Responses that are forced: the bits of the run that generated them, and Hugging Face's activations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import tiny
from tlcapture.errors import InputError
from tlcapture.generation.interventions.intervention import Add
from tlcapture.generation.loop import generate
from tlcapture.generation.outcomes import Failure, Generation
from tlcapture.generation.sampling.next_token import Sampling
from tlcapture.generation.typical_norms import norms_over_prompts
from tlcapture.prompts.tokenization import TokenizedPrompt, tokenize
from tlcapture.views.hooks import hook
from tlcapture.views.residual import residual_hooks

TEXTS = ["one", "and two", "three, the longest of them"]


def prompts() -> list[TokenizedPrompt]:
    return [tokenize(tiny.tokenizer(), text, prompt_set="s", prompt_id=n) for n, text in enumerate(TEXTS)]


def run(model: Any, given: list[TokenizedPrompt], **options: Any) -> dict[Any, Any]:
    hooks = [*residual_hooks(model.n_layers, model.hook_names), hook("pattern", 1)]
    outcomes = generate(model, given, hooks=hooks, **{"max_new_tokens": 7, "batch_size": 3, **options})
    return {outcome.prompt.id: outcome for outcome in outcomes}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_forced_tokens_give_the_bits_of_the_run_that_drew_them(engine: str, dtype: torch.dtype) -> None:
    model = tiny.model("llama", engine, dtype)
    drawn = run(model, prompts(), sampling=Sampling(1.0, seed=4))
    forced = run(model, [replace(each, forced=drawn[each.id].response_ids) for each in prompts()])
    for number, expected in drawn.items():
        found = forced[number]
        assert (found.response_ids, found.stop_reason) == (expected.response_ids, "given")
        assert all(torch.equal(found.cache[name], expected.cache[name]) for name in expected.cache)


def test_responses_of_different_lengths_leave_the_batch_one_by_one() -> None:
    model, theirs = tiny.model("llama"), tiny.hf_model("llama")
    lengths = {0: 5, 1: 2, 2: 7}
    ids = {n: tuple(range(40 + 10 * n, 40 + 10 * n + length)) for n, length in lengths.items()}
    found = run(model, [replace(each, forced=ids[int(each.id)]) for each in prompts()])
    for number, outcome in found.items():
        assert isinstance(outcome, Generation)
        assert outcome.response_ids == ids[number]
        with torch.no_grad():
            out = theirs(torch.tensor([outcome.token_ids]), output_hidden_states=True)
        for layer in range(1, model.n_layers):
            torch.testing.assert_close(
                outcome.cache[hook("residual_out", layer - 1)].cpu(), out.hidden_states[layer][0], rtol=1e-4, atol=1e-4
            )


def test_interventions_act_on_forced_tokens_as_on_generated_ones() -> None:
    model = tiny.model("llama")
    push = [Add(layer=1, addend=torch.ones(tiny.D_MODEL))]
    drawn = run(model, prompts(), sampling=Sampling(0), interventions=push)
    forced = run(model, [replace(each, forced=drawn[each.id].response_ids) for each in prompts()], interventions=push)
    for number, expected in drawn.items():
        assert all(torch.equal(forced[number].cache[name], expected.cache[name]) for name in expected.cache)


def test_what_does_not_fit_the_model_fails_by_prompt_and_what_is_mixed_is_refused() -> None:
    model = tiny.model("llama")
    first, *others = prompts()
    found = run(model, [replace(first, forced=(5000,)), *(replace(each, forced=(50,)) for each in others)])
    assert isinstance(found[0], Failure)
    assert found[0].error is InputError
    assert "5000" in found[0].reason
    for wrong in (
        [replace(first, forced=(50,)), *others],
        [replace(first, forced=())],
        [replace(first, forced=(9,) * 8)],
    ):
        with pytest.raises(ValueError, match="expected a forced response of 1 to max_new_tokens tokens"):
            run(model, wrong)


def test_typical_norms_are_those_of_the_prompts_where_one_of_the_given_responses_is_empty() -> None:
    model, plain = tiny.model("llama", tiny.ENGINES[0]), prompts()
    given = [replace(plain[0], given=()), *(replace(each, forced=(3, 4)) for each in plain[1:])]
    assert norms_over_prompts(model, given, [0, 1]) == norms_over_prompts(model, plain, [0, 1])
