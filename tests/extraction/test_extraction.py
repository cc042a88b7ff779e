"""Examples, their mean activations, and the directions found from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tlcapture.errors import InputError, TlcaptureError
from tlcapture.extraction.changed_examples import digest_of
from tlcapture.extraction.examples import Example, Examples, LabelledExample, Sides, content, read_examples
from tlcapture.extraction.methods import FITS
from tlcapture.extraction.prepared_examples import prepare_examples
from tlcapture.extraction.readout import read_out, shared_prefix, tokenize_example
from tlcapture.generation.typical_norms import TypicalNorms
from tlcapture.names import Trait
from tlcapture.storage.experiments.datasets import Datasets
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import write_json

TRAIT = Trait("c", "t")
SHIPPED = ["behavioral/refusal", "cognitive/retrieval", "style/formality", "affect/positivity"]


def write_side(root: Path, name: str, rows: list[Any]) -> None:
    folder = root / "datasets" / "traits" / "c" / "t"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def pairs(count: int) -> list[dict[str, str]]:
    return [{"pair": f"{n:02d}", "prompt": f"question {n}?", "response": f"answer {n}"} for n in range(count)]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_traits_have_at_least_40_paired_examples_per_side(tmp_path: Path, name: str) -> None:
    examples = read_examples(Datasets(tmp_path), Trait.parse(name))
    for positive in (True, False):
        side = [item.example for item in examples.items if item.positive == positive]
        assert len(side) >= 40
        assert len({example.response for example in side}) == len(side)
        assert all(example.pair for example in side)
    sides = [{item.example.pair for item in examples.items if item.positive == side} for side in (True, False)]
    assert sides[0] == sides[1]


def test_pairs_are_held_out_together_and_by_seed(tmp_path: Path) -> None:
    write_side(tmp_path, "positive.jsonl", pairs(20))
    write_side(tmp_path, "negative.jsonl", pairs(20))
    examples = read_examples(Datasets(tmp_path), TRAIT, seed=3)
    held = [{i.example.pair for i in examples.items if i.positive == side and i.held_out} for side in (True, False)]
    assert held[0] == held[1]
    assert len(held[0]) == 4
    record = examples.split_record(3)
    assert record["held_out_pairs"] == sorted(held[0])
    assert (record["n_train_positive"], record["n_held_out_negative"]) == (16, 4)
    again = read_examples(Datasets(tmp_path), TRAIT, seed=3)
    assert [item.held_out for item in again.items] == [item.held_out for item in examples.items]
    other = read_examples(Datasets(tmp_path), TRAIT, seed=4)
    assert [item.held_out for item in other.items] != [item.held_out for item in examples.items]


def test_examples_that_repeat_one_another_are_on_the_same_side_of_every_split(tmp_path: Path) -> None:
    again = [{"pair": f"again {n}", "prompt": f"Question  {n}?", "response": f"ANSWER {n}"} for n in range(10)]
    write_side(tmp_path, "positive.jsonl", [*pairs(20), *again])
    write_side(tmp_path, "negative.jsonl", [{"text": f"text {n // 2}"} for n in range(20)])
    items, groups = (examples := read_examples(Datasets(tmp_path), TRAIT)).items, examples.groups
    assert groups[:10] == groups[20:30]
    assert groups[30::2] == groups[31::2]
    assert len({*groups}) == 20 + 10
    held_out = [item.held_out for item in items]
    assert held_out[:10] == held_out[20:30]
    assert (sum(held_out[:20]), held_out[30::2], sum(held_out[30::2])) == (4, held_out[31::2], 2)


def test_of_examples_that_repeat_one_another_one_counts_for_the_error_of_an_effect_size(tmp_path: Path) -> None:
    def sides(positive: list[dict[str, str]], negative: list[dict[str, str]]) -> Sides:
        write_side(tmp_path, "positive.jsonl", positive)
        write_side(tmp_path, "negative.jsonl", negative)
        examples = read_examples(Datasets(tmp_path), TRAIT)
        return examples.sides(range(len(examples.items)))

    own, other = ([{"pair": f"{n}", "text": f"{side} {n}"} for n in range(5)] for side in "ab")
    assert sides(own, other[::-1]) == ([0, 1, 2, 3, 4], [9, 8, 7, 6, 5], True)
    again = [{**each, "pair": f"again {each['pair']}"} for each in own]
    assert sides(own + again, other + [{**each, "text": f"c{n}"} for n, each in enumerate(again)]) == (
        [0, 1, 2, 3, 4], [10, 11, 12, 13, 14], True,
    )  # fmt: skip
    assert sides([*own, {"text": "A  0"}, {"text": "a 7"}], other) == ([0, 1, 2, 3, 4, 6], [7, 8, 9, 10, 11], False)


def test_plain_text_files_are_read_as_one_example_per_line(tmp_path: Path) -> None:
    write_side(tmp_path, "positive.txt", ["one", "two", "", "three", "four", "five"])
    write_side(tmp_path, "negative.jsonl", [{"text": f"n{n}"} for n in range(5)])
    examples = read_examples(Datasets(tmp_path), TRAIT)
    lines = ["one", "two", "three", "four", "five"]
    assert [item.example.text for item in examples.items if item.positive] == lines
    assert (examples.lines_as, examples.is_guess) == ("texts", True)
    scenarios = read_examples(Datasets(tmp_path), TRAIT, examples_as="scenarios")
    assert [item.example.prompt for item in scenarios.items if item.positive] == lines
    assert [item.example.text for item in scenarios.items if not item.positive] == [f"n{n}" for n in range(5)]
    assert (scenarios.lines_as, scenarios.is_guess) == ("scenarios", False)
    assert examples.count(positive=True, held_out=True) == 1
    assert examples.count(positive=False, held_out=True) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{nonsense", "line 2: not valid JSON"),
        ({"text": "a", "prompt": "b"}, "line 2: .*either"),
        ({"response": "b"}, "line 2: .*either"),
        ({}, "line 2: .*either"),
        ({"text": "  "}, "line 2: .*empty"),
        ({"text": 3}, "line 2: text"),
        (
            {"text": "a", "extra": 1},
            "line 2: unknown key 'extra': expected text, prompt, response, pair, system_prompt$",
        ),
        ({"text": "a", "system_prompt": "b"}, 'line 2: a bare "text" has no "system_prompt"'),
    ],
)
def test_an_invalid_example_is_reported_by_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    write_side(tmp_path, "positive.jsonl", [{"text": "fine"}, row, {"text": "x"}, {"text": "y"}])
    write_side(tmp_path, "negative.jsonl", [{"text": "fine"}] * 4)
    with pytest.raises(InputError, match=rf"positive\.jsonl: {message}"):
        read_examples(Datasets(tmp_path), TRAIT)


def test_the_same_prompt_under_two_system_prompts_makes_two_examples(tmp_path: Path) -> None:
    prompts = [{"pair": f"{n}", "prompt": f"question {n}?"} for n in range(4)]
    for name, system_prompt in (("positive", "be rude"), ("negative", "be kind")):
        write_side(tmp_path, f"{name}.jsonl", [{**each, "system_prompt": system_prompt} for each in prompts])
    examples = read_examples(Datasets(tmp_path), TRAIT)
    assert len({content(item.example) for item in examples.items}) == 8
    layout, model = Layout(tmp_path, "e"), tiny.model("llama")
    for given in ("experiment's", "other"):  # which an example's own replaces
        write_json(layout.config, {"system_prompt": given})
        readings = prepare_examples(layout, model, examples, "last_prompt_token").readings
        read = [model.tokenizer.decode(reading.token_ids) for reading in readings]
        assert ["be rude" in text for text in read] == [True] * 4 + [False] * 4
        assert ["be kind" in text for text in read] == [False] * 4 + [True] * 4
        assert not any(given in text for text in read)
    answered = Example(prompt="why?", response="so", system_prompt="be rude")
    made = Examples(TRAIT, [LabelledExample(answered, positive=True, held_out=False)])
    (reading,) = prepare_examples(layout, model, made).readings
    assert "be rude" in model.tokenizer.decode(reading.token_ids)


def test_digests_of_examples_without_system_prompts_are_those_of_earlier_versions() -> None:
    made = [LabelledExample(Example(prompt="why?", response="so", pair="1"), positive=True, held_out=False)]
    assert digest_of(Examples(TRAIT, made)) == "39606fe143619d31"
    other = [replace(each, example=each.example.model_copy(update={"system_prompt": "be kind"})) for each in made]
    assert digest_of(Examples(TRAIT, other)) != "39606fe143619d31"


def test_too_few_examples_and_missing_files_are_reported(tmp_path: Path) -> None:
    write_side(tmp_path, "positive.jsonl", [{"text": "a"}])
    with pytest.raises(InputError, match=r"no negative\.jsonl"):
        read_examples(Datasets(tmp_path), TRAIT)
    write_side(tmp_path, "negative.jsonl", [{"text": "a"}] * 4)
    with pytest.raises(InputError, match="1 positive examples, expected at least 4"):
        read_examples(Datasets(tmp_path), TRAIT)
    with pytest.raises(InputError, match=r"no examples for trait 'x/y'.*existing traits: .*c/t"):
        read_examples(Datasets(tmp_path), Trait("x", "y"))


def test_the_mean_is_over_the_tokens_of_the_response_only() -> None:
    model = tiny.model("llama")
    example = Example(prompt="why?", response="because")
    reading = tokenize_example(model.tokenizer, example)
    assert model.tokenizer.decode(reading.token_ids[reading.start :]) == "because"
    assert reading.position == "response_mean"
    text = tokenize_example(model.tokenizer, Example(text="because"))
    assert (text.position, text.start) == ("all_mean", 1)


def test_read_out_equals_hugging_face_one_example_at_a_time() -> None:
    model, reference = tiny.model("qwen2"), tiny.hf_model("qwen2")
    examples = [Example(prompt="q" * n, response="r" * (n + 2)) for n in (1, 9, 4, 17, 2)]
    readings = [tokenize_example(model.tokenizer, example) for example in examples]
    for batch_size in (1, 2, 5):
        means = read_out(model, readings, ["residual", "attn_out"], batch_size=batch_size)
        assert means["residual"].shape == means["attn_out"].shape == (3, 5, tiny.D_MODEL)
        for number, reading in enumerate(readings):
            with torch.no_grad():
                states = reference(torch.tensor([reading.token_ids]), output_hidden_states=True).hidden_states
            for layer in range(2):  # the last hidden state is after the final norm
                expected = states[layer + 1][0, reading.start :].mean(dim=0)
                assert torch.allclose(means["residual"][layer, number], expected, atol=1e-4)


def test_means_of_all_layers_are_copied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    readings = [tokenize_example(model.tokenizer, Example(prompt="q", response="r" * n)) for n in (1, 4, 2)]
    calls: list[int] = []
    copy = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda each: calls.append(each.ndim) or copy(each))
    norms = TypicalNorms()
    read_out(model, readings, ["residual", "attn_out"], batch_size=3, norms=norms)
    assert sorted(each for each in calls if each > 1) == [2, 3, 3]  # norms, and means of each component
    tokens = [sum(each.stop - each.start for each in readings)] * 3
    assert [len(torch.cat(each)) for each in norms._norms.values()] == tokens


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("engine", tiny.ENGINES)
@pytest.mark.parametrize("position", ["auto", "last_prompt_token", "all_mean"])
def test_a_shared_prefix_changes_no_mean(name: str, engine: str, position: str) -> None:
    model = tiny.model(name, engine)
    texts = [("what is it?", "a b c"), ("what is that thing, and why?", "d" * 20), ("whatever", "e")]
    readings = [
        tokenize_example(model.tokenizer, Example(prompt=prompt, response=response), position=position)
        for prompt, response in texts
    ]
    assert shared_prefix(readings) == (1 if position == "all_mean" else len("<") + len("user\nwhat") + 1)
    together = read_out(model, readings, ["residual"])["residual"]
    for number, reading in enumerate(readings):
        alone = read_out(model, [reading], ["residual"])["residual"][:, 0]
        assert torch.allclose(together[:, number], alone, atol=1e-4)
        with torch.no_grad():
            hidden = tiny.hf_model(name)(torch.tensor([reading.token_ids]), output_hidden_states=True).hidden_states
        expected = hidden[1][0, reading.start : reading.stop].mean(dim=0)
        assert torch.allclose(alone[0], expected, atol=1e-4)


def test_each_position_has_its_span() -> None:
    tokenizer = tiny.tokenizer()
    example = Example(prompt="why?", response="because")
    last = tokenize_example(tokenizer, example, position="last_prompt_token")
    assert (last.start, last.stop) == (len(last.token_ids) - 1, len(last.token_ids))
    assert tokenizer.decode(last.token_ids).endswith("<turn>assistant\n")
    everything = tokenize_example(tokenizer, example, position="all_mean")
    assert (everything.start, everything.stop) == (1, len(everything.token_ids))
    with pytest.raises(InputError, match="no position 'last': choose one of auto, response_mean"):
        tokenize_example(tokenizer, example, position="last")
    with pytest.raises(InputError, match="a bare text has no response"):
        tokenize_example(tokenizer, Example(text="x"), position="last_prompt_token")


def test_an_example_may_be_as_long_as_the_context_and_no_longer() -> None:
    model = tiny.model("llama")
    fixed = len(tokenize_example(model.tokenizer, Example(text="x")).token_ids) - 1
    longest = tokenize_example(model.tokenizer, Example(text="x" * (model.n_ctx - fixed)))
    assert len(longest.token_ids) == model.n_ctx
    assert read_out(model, [longest], ["residual"])["residual"].isfinite().all()
    longer = tokenize_example(model.tokenizer, Example(text="x" * (model.n_ctx - fixed + 1)))
    with pytest.raises(
        InputError, match=f"an example has {model.n_ctx + 1} tokens, the model's context is {model.n_ctx}"
    ):
        read_out(model, [longest, longer], ["residual"])


def test_examples_are_counted_once_and_norms_are_those_of_the_tokens_read_out() -> None:
    model, reference = tiny.model("llama"), tiny.hf_model("llama")
    readings = [tokenize_example(model.tokenizer, Example(prompt="q" * n, response="r" * n)) for n in (1, 5, 3, 8, 2)]
    counts: list[int] = []
    norms = TypicalNorms()
    read_out(model, readings, ["residual"], batch_size=2, on_examples=counts.append, norms=norms)
    assert counts == [2, 2, 1]
    with torch.no_grad():
        runs = [reference(torch.tensor([each.token_ids]), output_hidden_states=True) for each in readings]
    for layer in (0, 1):  # the last hidden state is after the final norm
        found = [
            run.hidden_states[layer + 1][0, each.start :].norm(dim=-1) for each, run in zip(readings, runs, strict=True)
        ]
        assert norms.medians()[layer] == pytest.approx(float(torch.cat(found).median()), rel=1e-4)


def test_a_text_of_one_token_without_a_bos_is_read_at_that_token() -> None:
    model = tiny.model("llama")
    reading = tokenize_example(tiny.tokenizer(bos=False), Example(text="x"))
    assert (len(reading.token_ids), reading.start, reading.stop) == (1, 0, 1)
    with torch.no_grad():
        run = tiny.hf_model("llama")(torch.tensor([reading.token_ids]), output_hidden_states=True)
    found = read_out(model, [reading], ["residual"])["residual"][0, 0]
    assert torch.allclose(found, run.hidden_states[1][0, 0], atol=1e-4)


def test_a_bare_text_is_not_read_with_the_chat_template() -> None:
    tokenizer = tiny.tokenizer()
    text, pair = Example(text="x"), Example(prompt="q", response="r")
    assert (tokenize_example(tokenizer, text).chat_template, tokenize_example(tokenizer, pair).chat_template) == (
        False,
        True,
    )


@pytest.mark.usefixtures("quick_collections")
def test_out_of_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("qwen2")
    readings = [tokenize_example(model.tokenizer, Example(prompt="q", response="r" * n)) for n in range(1, 9)]
    expected = read_out(model, readings, ["residual"], batch_size=1)
    original = type(model).step

    def step(self: Any, tokens: Any, *args: Any, **options: Any) -> Any:
        if len(tokens) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, tokens, *args, **options)

    monkeypatch.setattr(type(model), "step", step)
    found = read_out(model, readings, ["residual"], batch_size=8)
    assert torch.allclose(found["residual"], expected["residual"], atol=1e-4)

    def never(self: Any, tokens: Any, *args: Any, **options: Any) -> Any:
        if options["want_logits"] is False and args[2]:
            raise MemoryError
        return original(self, tokens, *args, **options)

    monkeypatch.setattr(type(model), "step", never)
    with pytest.raises(TlcaptureError, match="out of memory with an example"):
        read_out(model, readings, ["residual"])


def planted(n: int = 60, width: int = 24, layers: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise with a known direction added to the positive half."""
    torch.manual_seed(0)
    labels = torch.arange(n) % 2 == 0
    direction = torch.nn.functional.normalize(torch.randn(layers, width), dim=-1)
    activations = torch.randn(layers, n, width) + 4 * labels[None, :, None] * direction[:, None]
    return activations, labels, direction


@pytest.mark.parametrize("method", list(FITS))
def test_every_method_finds_a_planted_direction_with_its_sign(method: str) -> None:
    activations, labels, direction = planted()
    vectors = FITS[method](activations, labels, seed=0)
    cosine = torch.nn.functional.cosine_similarity(vectors, direction, dim=-1)
    assert (cosine > 0.7).all()


@pytest.mark.parametrize("method", list(FITS))
def test_methods_are_deterministic_and_independent_of_the_scale_of_a_layer(method: str) -> None:
    activations, labels, _ = planted()
    first, second = (FITS[method](activations, labels, seed=1) for _ in range(2))
    assert torch.equal(first, second)
    scaled = FITS[method](activations * 1000, labels, seed=1)
    assert (torch.nn.functional.cosine_similarity(first, scaled, dim=-1) > 0.999).all()


def test_mean_diff_is_the_difference_of_means_and_gradient_has_length_one() -> None:
    activations, labels, _ = planted()
    expected = activations[:, labels].mean(1) - activations[:, ~labels].mean(1)
    assert torch.equal(FITS["mean_diff"](activations, labels), expected)
    assert torch.allclose(FITS["gradient"](activations, labels).norm(dim=-1), torch.ones(3), atol=1e-5)


def test_probe_equals_a_logistic_regression_of_each_layer() -> None:
    from sklearn.linear_model import LogisticRegression

    activations, labels, _ = planted(layers=2)
    vectors = FITS["probe"](activations, labels)
    for layer in range(2):
        data = activations[layer] - activations[layer].mean(0)
        expected = LogisticRegression(max_iter=1000).fit((data / data.pow(2).mean().sqrt()).numpy(), labels.numpy())
        found = torch.nn.functional.cosine_similarity(vectors[layer], torch.tensor(expected.coef_[0]).float(), dim=0)
        assert found > 0.9999
