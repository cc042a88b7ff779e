"""Interventions by closed form: what a layer's `residual_out` is under them, at every token, on every engine.

What is done to `residual_out` of one layer changes that layer only by what is done at the token itself, so an
unsteered pass over the same tokens says what it has to be.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.test_chat_templates import PUBLISHED
from tests.test_parity import as_prompt, random_ids
from tlcapture.errors import InputError
from tlcapture.generation.interventions.intervention import Add, Intervention, Limit, Remove
from tlcapture.generation.interventions.thinking_rows import thinking_rows, thinking_tokens
from tlcapture.generation.interventions.where import (
    EVERYWHERE,
    FROM_LAST_PROMPT_TOKEN,
    PROMPT,
    RESPONSE,
    THINKING,
    Where,
)
from tlcapture.generation.loop import generate, teacher_force
from tlcapture.generation.outcomes import Generation
from tlcapture.generation.sampling.next_token import GIVEN, Choice, Sampling
from tlcapture.prompts.thinking import marker_tokens

LENGTHS = (17, 9, 4, 1)
N_NEW = 4
POINTS = [f"blocks.{layer}.hook_resid_post" for layer in range(tiny.N_LAYERS)]
UNIT = torch.nn.functional.normalize(torch.linspace(-1, 2, tiny.D_MODEL), dim=0)
ADDEND = 3 * UNIT
FIRST_2 = Where("first", 2)
WHERES = {
    EVERYWHERE: lambda token, n_prompt: True,
    FROM_LAST_PROMPT_TOKEN: lambda token, n_prompt: token >= n_prompt - 1,
    PROMPT: lambda token, n_prompt: token < n_prompt,
    RESPONSE: lambda token, n_prompt: token >= n_prompt,
    FIRST_2: lambda token, n_prompt: n_prompt <= token < n_prompt + 2,
}
each_where = pytest.mark.parametrize("where", WHERES, ids=str)
each_engine = pytest.mark.parametrize("engine", [*tiny.ENGINES, *(["plain"] if "hooked" in tiny.ENGINES else [])])
each_batch_size = pytest.mark.parametrize("batch_size", [1, 4])


def run(model: Any, interventions: list[Intervention], batch_size: int = 4, **options: Any) -> list[Generation]:
    lengths = LENGTHS if batch_size > 1 else LENGTHS[1::2]  # alone they differ in nothing else
    prompts = [as_prompt(random_ids(length, seed=length), str(length)) for length in lengths]
    chosen = {"max_new_tokens": N_NEW, "sampling": Sampling(1.0, seed=5), "batch_size": batch_size, **options}
    found = list(generate(model, prompts, hooks=POINTS, interventions=interventions, **chosen))
    assert len(found) == len(lengths) and all(isinstance(each, Generation) for each in found)
    return [each for each in found if isinstance(each, Generation)]


def acts(where: Where, outcome: Generation) -> Tensor:
    n_prompt = len(outcome.prompt.token_ids)
    return torch.tensor([WHERES[where](token, n_prompt) for token in range(len(outcome.token_ids))])


@each_engine
@each_batch_size
@each_where
def test_the_residual_is_the_unsteered_one_plus_the_addend_at_the_stated_tokens(
    engine: str, batch_size: int, where: Where
) -> None:
    model = tiny.model("llama", engine)
    for outcome in run(model, [Add(layer=1, addend=ADDEND, where=where)], batch_size):
        plain = teacher_force(model, outcome.token_ids, POINTS)
        expected = plain[POINTS[1]] + acts(where, outcome)[:, None] * ADDEND
        torch.testing.assert_close(outcome.cache[POINTS[0]], plain[POINTS[0]], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(outcome.cache[POINTS[1]], expected, atol=2e-5, rtol=1e-4)
        assert (outcome.cache[POINTS[2]] - plain[POINTS[2]]).abs().max() > 1e-2


@each_engine
@each_batch_size
@each_where
def test_an_ablated_projection_is_zero_at_each_layer_and_token(engine: str, batch_size: int, where: Where) -> None:
    model = tiny.model("gpt2", engine)
    ablations: list[Intervention] = [Remove(layer=layer, direction=UNIT, where=where) for layer in (0, 2)]
    for outcome in run(model, ablations, batch_size):
        at = acts(where, outcome)
        for layer in (0, 2):
            along = outcome.cache[POINTS[layer]] @ UNIT
            assert along[at].abs().max() < 1e-5
            assert at.all() or along[~at].abs().max() > 1e-3
        plain = teacher_force(model, outcome.token_ids, POINTS[:1])[POINTS[0]]
        expected = plain - (at * (plain @ UNIT))[:, None] * UNIT
        torch.testing.assert_close(outcome.cache[POINTS[0]], expected, atol=2e-5, rtol=1e-4)


@each_engine
@each_batch_size
@each_where
def test_a_cap_holds_and_changes_nothing_below_it(engine: str, batch_size: int, where: Where) -> None:
    model, most = tiny.model("llama", engine), 0.01
    n_above = n_below = 0
    for outcome in run(model, [Limit(layer=1, direction=UNIT, most=most, where=where)], batch_size):
        at, plain = acts(where, outcome), teacher_force(model, outcome.token_ids, POINTS)[POINTS[1]]
        along, found = plain @ UNIT, outcome.cache[POINTS[1]]
        expected = plain - (at * (along - most).clamp(min=0))[:, None] * UNIT
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        assert (found @ UNIT)[at].max() < most + 1e-5
        n_above, n_below = n_above + int((along[at] > most).sum()), n_below + int((along[at] < most).sum())
    assert n_above and n_below, "both kinds of tokens"


@each_engine
def test_interventions_at_one_layer_act_in_the_order_given(engine: str) -> None:
    model, add, remove = tiny.model("llama", engine), Add(layer=1, addend=ADDEND), Remove(layer=1, direction=UNIT)
    for order, along_after in (([add, remove], 0.0), ([remove, add], 3.0)):
        for outcome in run(model, order):
            at, along = acts(FROM_LAST_PROMPT_TOKEN, outcome), outcome.cache[POINTS[1]] @ UNIT
            torch.testing.assert_close(along[at], torch.full_like(along[at], along_after), atol=2e-5, rtol=1e-4)
            assert along[~at].abs().max() < 1e-5 if (~at).any() else True


@each_engine
@each_batch_size
def test_given_responses_are_read_with_and_without_interventions(engine: str, batch_size: int) -> None:
    model, add = tiny.model("llama", engine), Add(layer=1, addend=ADDEND, where=FIRST_2)
    steered = {each.prompt.id: each for each in run(model, [add], batch_size)}
    given = [
        replace(each.prompt, given=each.response_ids[: 1 + number]) for number, each in enumerate(steered.values())
    ]
    options: Any = {"hooks": POINTS, "batch_size": batch_size}
    both = [list(generate(model, given, interventions=changes, **options)) for changes in ([], [add])]
    for plain, again in zip(*both, strict=True):
        before = steered[again.prompt.id]
        assert again.stop_reason == plain.stop_reason == GIVEN and again.response_ids == again.prompt.given
        for point in POINTS:
            expected = before.cache[point][: len(again.token_ids)]
            torch.testing.assert_close(again.cache[point], expected, atol=2e-5, rtol=1e-4)
        changed = acts(FIRST_2, again)[:, None] * ADDEND
        torch.testing.assert_close(again.cache[POINTS[1]] - plain.cache[POINTS[1]], changed, atol=2e-5, rtol=1e-4)


def test_responses_are_given_to_all_prompts_or_none() -> None:
    prompts = [as_prompt([5, 6], "1"), replace(as_prompt([5, 6], "2"), given=(7,))]
    with pytest.raises(ValueError, match="a given response for each prompt, or for none"):
        list(generate(tiny.model("llama"), prompts, hooks=[]))


@each_engine
def test_own_hooks_are_called_in_every_pass_before_the_interventions(engine: str) -> None:
    model, seen = tiny.model("llama", engine), []

    def double(activation: Tensor, hook: Any) -> Tensor:
        seen.append(len(activation))
        return 2 * activation

    for outcome in run(model, [Add(layer=1, addend=ADDEND)], own_hooks=[(POINTS[1], double)]):
        plain = teacher_force(model, outcome.token_ids, POINTS)[POINTS[1]]
        expected = 2 * plain + acts(FROM_LAST_PROMPT_TOKEN, outcome)[:, None] * ADDEND
        torch.testing.assert_close(outcome.cache[POINTS[1]], expected, atol=4e-5, rtol=1e-4)
    assert len(seen) >= 1 + N_NEW


# -- thinking -------------------------------------------------------------------------------------

THINKING_TEMPLATE = (
    "{% for message in messages %}{% if message.reasoning_content is defined %}OPEN{{ message.reasoning_content }}CLOSE"
    "{% endif %}{{ message.content }}{% endfor %}"
)


def thinking_tokenizer(open: str, close: str, *, are_tokens: bool) -> Any:
    template = THINKING_TEMPLATE.replace("OPEN", open).replace("CLOSE", close)
    found = tiny.tokenizer(chat_template=template)
    if are_tokens:  # they take the place of the last two bytes, so that the vocabulary is as large as before
        found.add_special_tokens({"additional_special_tokens": [open, close]})
    return found


def test_a_token_is_thinking_between_the_tokens_that_complete_the_markers() -> None:
    tokenizer = thinking_tokenizer("<hm>", "</hm>", are_tokens=False)
    text = "<hm>ab</hm>c<hm>d"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = [text[at : at + 1] for at, inside in enumerate(thinking_tokens(tokenizer, "", ids)) if inside]
    assert "".join(texts) == "ab</hm" + "d", "the marker that is not complete yet cannot be told from thinking"
    opened = thinking_tokens(tokenizer, "question<hm>", tokenizer("ab</hm>c", add_special_tokens=False)["input_ids"])
    assert opened == [True] * 6 + [False, False]


def test_markers_are_known_by_their_ids_where_each_is_one_token_and_they_alone_decide() -> None:
    tokenizer = thinking_tokenizer("<hm>", "</hm>", are_tokens=True)
    assert marker_tokens(tokenizer) == tuple(tokenizer.convert_tokens_to_ids(["<hm>", "</hm>"]))
    assert marker_tokens(tokenizer, chat_template=False) is None
    assert marker_tokens(thinking_tokenizer("<hm>", "</hm>", are_tokens=False)) is None  # several tokens
    assert marker_tokens(tiny.tokenizer()) is None  # no markers
    channels = tiny.tokenizer(chat_template=PUBLISHED["gptoss"])
    channels.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|channel|>analysis<|message|>"]})
    assert marker_tokens(channels) is None  # other channels begin the answer


@pytest.mark.parametrize("are_tokens", [True, False])
def test_rows_are_followed_on_the_device_as_by_their_text(are_tokens: bool) -> None:
    tokenizer = thinking_tokenizer("<hm>", "</hm>", are_tokens=are_tokens)
    generator = torch.Generator().manual_seed(2)
    vocabulary = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("<hm>", "</hm>", "a", "b\n", "ä")]
    drawn = torch.randint(0, 5, (5, 40), generator=generator).tolist()
    rows = [[token for number in each for token in vocabulary[number]] for each in drawn]
    openings = ["", "<hm>", "a<hm>b</hm>", "<hm>x", ""]
    length = min(map(len, rows))
    rows = [row[:length] for row in rows]
    expected = torch.tensor([thinking_tokens(tokenizer, *pair) for pair in zip(openings, rows, strict=True)])
    assert expected.any() and not expected.all()
    followed = thinking_rows(tokenizer, openings, [row[:3] for row in rows], [True] * 5)
    assert type(followed).__name__ == ("_ByToken" if are_tokens else "_ByText")
    tokens, kept = torch.tensor(rows), list(range(5))
    for step in range(3, length):
        assert torch.equal(followed.read(tokens[kept, step]), expected[kept, step])
        if step == 9:
            kept = [0, 2, 3]
            followed.keep(kept)


@each_engine
@pytest.mark.parametrize("are_tokens", [True, False])
def test_an_intervention_on_thinking_acts_at_its_tokens(
    engine: str, are_tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("llama", engine)
    tokenizer = thinking_tokenizer("<h>", "</h>", are_tokens=False)
    if are_tokens:  # one-token markers of the model's own vocabulary
        monkeypatch.setattr(
            "tlcapture.generation.interventions.thinking_rows.marker_tokens", lambda *words, **options: (70, 71)
        )
        scripts = [[70, 9, 10, 71, 11, 12], [9, 71, 10, 70, 11, 12]]
        inside = [[0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 1, 1]]
    else:
        texts = ["<h>ab</h>cd", "ab</h>c<h>d"]
        scripts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        pairs = zip(("", "<h>"), scripts, strict=True)
        inside = [[int(each) for each in thinking_tokens(tokenizer, *pair)] for pair in pairs]
    monkeypatch.setattr(model, "tokenizer", tokenizer)
    prompts = [
        replace(as_prompt(random_ids(7, seed=1), "0"), opening="", chat_template=True),
        replace(as_prompt(random_ids(3, seed=2), "1"), opening="<h>", chat_template=True),
    ]
    steps = iter(range(100))

    def choose(logits: Tensor, *rest: Any) -> Choice:
        step = next(steps)
        tokens = torch.tensor([script[step] for script in scripts])
        return Choice(tokens, torch.ones(2, dtype=torch.bool))

    monkeypatch.setattr("tlcapture.generation.batch.choose_tokens", choose)
    add = Add(layer=1, addend=ADDEND, where=THINKING)
    options: Any = {"hooks": POINTS, "max_new_tokens": len(scripts[0]), "interventions": [add]}
    outcomes = sorted(generate(model, prompts, **options), key=lambda each: each.prompt.id)
    for number, outcome in enumerate(outcomes):
        assert isinstance(outcome, Generation) and list(outcome.response_ids) == scripts[number]
        at = torch.tensor([0] * len(outcome.prompt.token_ids) + inside[number])
        plain = teacher_force(model, outcome.token_ids, POINTS)[POINTS[1]]
        expected = plain + at[:, None] * ADDEND
        torch.testing.assert_close(outcome.cache[POINTS[1]], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("text", ["", "everywher", "first=0", "first=-1", "first=", "first=2.5", "response "])
def test_a_malformed_place_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(InputError, match="expected prompt, response, thinking or first=N"):
        Where.parse(text)


def test_markers_of_a_chat_template_are_not_looked_for_in_prompts_that_it_did_not_render() -> None:
    tokenizer = thinking_tokenizer("<hm>", "</hm>", are_tokens=False)
    ids = tokenizer("<hm>ab</hm>c", add_special_tokens=False)["input_ids"]
    assert any(thinking_tokens(tokenizer, "", ids))
    assert not any(thinking_tokens(tokenizer, "", ids, chat_template=False))
    for templated in ([False], [False, True]):
        n_rows = len(templated)
        followed = thinking_rows(tokenizer, ["<hm>"] * n_rows, [ids[:5]] * n_rows, templated)
        assert followed.read(torch.tensor(ids[5:6] * n_rows)).tolist() == templated
