"""Rules and stop texts that are given as options: compared with Hugging Face's `generate` and its processors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import Result

from tests import tiny
from tests.test_parity import as_prompt
from tests.test_sampling import PROMPTS, by_hugging_face, generated, with_config
from tlcapture import capture
from tlcapture.captures.capture import Capture
from tlcapture.errors import InputError
from tlcapture.generation.loop import generate
from tlcapture.generation.sampling.checkpoint_sampling import asked_sampling, sampling_for, without_effect
from tlcapture.generation.sampling.next_token import Sampling
from tlcapture.generation.sampling.processors import LogitProcessors, LogitRules, PromptTokens
from tlcapture.generation.sampling.top_p import TopP
from tlcapture.generation.stop_texts import StopTexts

RULES: dict[str, dict[str, Any]] = {
    "top_p": {"top_p": 0.6},
    "top_k": {"top_k": 5},
    "min_p": {"min_p": 0.2},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "all": {"top_p": 0.9, "top_k": 40, "min_p": 0.02, "repetition_penalty": 1.3},
}
N_DRAWS = 4000


def chi_square_z(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """By how many deviations chi-square exceeds its mean; tokens of which five or fewer are expected count together."""
    often = expected > 5
    counts = torch.cat([counts[often], counts[~often].sum()[None]]).double()
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    kept = expected > 0
    freedom = max(1, int(kept.sum()) - 1)
    statistic = float(((counts - expected) ** 2 / expected)[kept].sum())
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


@pytest.mark.parametrize("engine", tiny.ENGINES)
@pytest.mark.parametrize("rules", RULES)
def test_greedy_tokens_equal_those_of_generate_in_every_batch(rules: str, engine: str) -> None:
    model = with_config(engine)
    options = {"do_sample": False, "repetition_penalty": RULES[rules].get("repetition_penalty")}
    expected = {name: by_hugging_face(model, list(ids), **options) for name, ids in PROMPTS.items()}
    for batch_size in (1, 3):
        found = generated(model, Sampling(0, **RULES[rules]), batch_size)
        assert {name: list(ids) for name, ids in found.items()} == expected


@pytest.mark.parametrize("rules", RULES)
def test_sampled_tokens_have_the_distribution_of_generate(rules: str) -> None:
    model, ids = with_config(tiny.ENGINES[0]), PROMPTS["11"]
    sampling = Sampling(1.4, seed=2, **RULES[rules])
    prompts = [as_prompt(ids, str(number)) for number in range(N_DRAWS)]
    drawn = generate(model, prompts, hooks=[], max_new_tokens=1, sampling=sampling, batch_size=1000)
    shares = Counter(outcome.response_ids[0] for outcome in drawn)
    options = {"do_sample": True, "temperature": 1.4, "top_k": 0, **RULES[rules]}
    made = tiny.hf_model("llama").generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=1,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    expected = made.scores[0][0].double().softmax(-1)
    assert set(shares) <= set(expected.nonzero()[:, 0].tolist())
    counts = torch.zeros(len(expected))
    for token, count in shares.items():
        counts[token] = count
    assert chi_square_z(counts, expected * N_DRAWS) < 4


@pytest.mark.parametrize("rules", RULES)
def test_the_scores_are_those_of_the_processors_of_transformers_in_the_order_of_generate(rules: str) -> None:
    prompt, rows = [3, 7, 7, 90], torch.randn(4, 300, generator=torch.Generator().manual_seed(1)) * 3
    asked = RULES[rules]
    classes = {
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    values = {"temperature": 0.8, **asked}
    expected = rows
    for name, kind in classes.items():
        if name in values:
            expected = kind(values[name])(torch.tensor([prompt] * 4), expected)
    processors = LogitProcessors(Sampling(0.8, **asked).rules, 0.8, [PromptTokens(prompt, frozenset(), 9)] * 4)
    torch.testing.assert_close(processors(rows).softmax(-1), expected.softmax(-1), atol=1e-6, rtol=1e-5)


def test_padding_is_never_penalised() -> None:
    """The first of two prompts is padded with token 0, which it does not have."""
    prompts = [PromptTokens((5,), frozenset(), 3), PromptTokens((6, 7, 8), frozenset(), 3)]
    processors = LogitProcessors(LogitRules(repetition_penalty=2.0), 0, prompts)
    assert processors(torch.ones(2, 10)).tolist() == [
        [0.5 if token == 5 else 1.0 for token in range(10)],
        [0.5 if token in (6, 7, 8) else 1.0 for token in range(10)],
    ]
    processors.append(torch.tensor([9, 0]))
    processors.keep([1])
    assert processors(-torch.ones(1, 10)).tolist() == [[-2.0 if token in (0, 6, 7, 8) else -1.0 for token in range(10)]]


@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.95, 0.999])
def test_top_p_is_the_mask_of_a_full_sort(top_p: float) -> None:
    generator = torch.Generator().manual_seed(3)
    hf, ours = transformers.TopPLogitsWarper(top_p), TopP(top_p)
    for spread in (0.0, 0.3, 1.0, 4.0, 9.0):
        for d_vocab in (3, 128, 129, 5000):
            rows = torch.randn(6, d_vocab, generator=generator) * spread
            rows[1] = rows[1].round()  # many ties
            rows[2, ::2] = -math.inf
            rows[3] = rows[3].bfloat16().float()
            rows[4, 0] = math.nan
            rows[5] = -math.inf
            assert torch.equal(ours(None, rows).nan_to_num(7.0), hf(None, rows).nan_to_num(7.0))


def test_top_p_sorts_the_whole_vocabulary_only_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, asked = TopP(0.9), []
    monkeypatch.setattr(ours, "_among_all", lambda scores: asked.append(len(scores)))
    peaked = torch.linspace(0, -900, 3000).repeat(4, 1)
    assert torch.equal(ours(None, peaked), transformers.TopPLogitsWarper(0.9)(None, peaked))
    assert not asked


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_p": 1.5}, "top_p 1.5: expected a number from 0 to 1"),
        ({"top_p": math.nan}, "top_p nan: expected a number from 0 to 1"),
        ({"top_k": -1}, "top_k -1: expected a whole number of at least 0"),
        ({"top_k": True}, "top_k True: expected a whole number of at least 0"),
        ({"repetition_penalty": 0}, "repetition_penalty 0: expected a number above 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty inf: expected a number above 0"),
        ({"temperature": -1}, "temperature -1: expected a number of at least 0; 0 is greedy"),
        ({"temperature": True}, "temperature True: expected a number of at least 0; 0 is greedy"),
        ({"min_p": False}, "min_p False: expected a number from 0 to 1"),
        ({"stop": [""]}, "stop '': expected a text that is not empty"),
    ],
)
def test_values_that_are_not_valid_are_named_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        Sampling(**values)
    given = {"temperature": None, "seed": 0, **values}
    for source in ("plain", "checkpoint"):
        with pytest.raises(InputError, match=f"^{message}$"):
            asked_sampling(source, **given)


def test_a_sampling_shows_what_it_changes_and_values_that_change_nothing_are_not_recorded() -> None:
    sampling = Sampling(0.8, top_p=0.9, top_k=0, min_p=0, repetition_penalty=1.0, stop="END")
    assert repr(sampling) == "Sampling(temperature=0.8, seed=0, top_p=0.9, stop=['END'])"
    assert sampling.record() == {
        "temperature": 0.8, "seed": 0, "sampling": {"source": "plain", "top_p": 0.9, "stop": ["END"]}
    }  # fmt: skip
    assert Sampling(top_p=1).record() == {"temperature": 0.7, "seed": 0}
    assert sampling == Sampling(0.8, rules=LogitRules(top_p=0.9), stop=["END"])


def test_rules_that_are_given_take_the_place_of_the_checkpoints_own() -> None:
    model = with_config(tiny.ENGINES[0], do_sample=True, temperature=1.5, top_p=0.5, stop_strings=["END"])
    given = asked_sampling("checkpoint", None, 0, ["#"], top_p=0.9, top_k=0)
    assert repr(sampling_for(given, model)) == (
        "Sampling(temperature=1.5, seed=0, top_p=0.9, stop=['END', '#'], source='checkpoint')"
    )


def test_rules_for_sampling_are_said_to_change_nothing_in_a_greedy_choice() -> None:
    assert without_effect(Sampling(0, top_p=0.9, min_p=0.1)) == (
        "temperature 0 is greedy: min_p and top_p change nothing"
    )
    assert without_effect(Sampling(0, repetition_penalty=1.2)) is without_effect(Sampling(top_p=0.9)) is None


@pytest.mark.parametrize("engine", tiny.ENGINES)
def test_a_response_ends_with_the_token_that_completes_a_stop_text_as_in_generate(engine: str) -> None:
    """Stop texts that lie across tokens are cut out of what is generated without them."""
    model = with_config(engine)
    texts = model.tokenizer.batch_decode([[token] for token in range(model.d_vocab)])
    others = [token for token, text in enumerate(texts) if not (text.isascii() and text.isprintable())]
    rules = LogitRules(suppress_tokens=others)
    whole = generated(model, Sampling(0, rules=rules))
    for first, last in ((2, 4), (3, 6)):
        stop = model.tokenizer.decode(list(whole["11"][first:last]), clean_up_tokenization_spaces=False)
        options = {"stop_strings": [stop], "tokenizer": model.tokenizer, "do_sample": False, "suppress_tokens": others}
        expected = {name: by_hugging_face(model, list(ids), **options) for name, ids in PROMPTS.items()}
        found = generated(model, Sampling(0, rules=rules, stop=["never", stop]))
        assert {name: list(ids) for name, ids in found.items()} == expected
        assert len(found["11"]) == last


def test_the_token_that_completes_a_stop_text_is_kept_with_its_activations(tiny_folder: Path) -> None:
    model = str(tiny_folder)
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": 3.0, "seed": 1}
    whole = next(capture(model, "The lighthouse", **options))
    texts = whole.response.tokens
    at = next(n for n in range(3, len(texts)) if texts[n].isascii() and texts[n].strip() and texts[n] not in texts[:n])
    (found,) = capture(whole.model, "The lighthouse", **options, stop=texts[at])
    assert found.metadata["stop_reason"] == "stop_text"
    assert found.metadata["sampling"] == {"source": "plain", "stop": [texts[at]]}
    assert found.response.token_ids == whole.response.token_ids[: at + 1]
    assert torch.equal(found.residual(1), whole.residual(1)[: len(found.tokens)])


def test_python_takes_rules_as_keywords_or_as_a_sampling(tiny_folder: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6}
    (keywords,) = capture(str(tiny_folder), "A lamp", temperature=1.2, seed=3, top_k=4, **options)
    (sampling,) = capture(keywords.model, "A lamp", sampling=Sampling(1.2, 3, top_k=4), **options)
    assert keywords.token_ids == sampling.token_ids
    assert sampling.metadata["sampling"] == {"source": "plain", "top_k": 4}
    with pytest.raises(InputError, match=r"^give sampling as a Sampling or as temperature and other"):
        next(capture(keywords.model, "A lamp", sampling=Sampling(), top_p=0.9))


def test_the_command_records_what_was_given(tlcapture: Callable[..., Result], root: Path, tiny_folder: Path) -> None:
    words = ("--experiment", "e", "--prompt", "x", "--model", tiny_folder, "--max-new-tokens", 5)
    rules = ("--top-p", 0.8, "--top-k", 9, "--min-p", 0.01, "--repetition-penalty", 1.2, "--stop", "qq", "--stop", "zz")
    tlcapture("capture", *words, *rules)
    file = root / "experiments/e/inference/raw/residual/adhoc/1.pt"
    expected = {"source": "plain", "repetition_penalty": 1.2, "top_k": 9, "top_p": 0.8, "min_p": 0.01}
    assert Capture.open(file).metadata["sampling"] == {**expected, "stop": ["qq", "zz"]}
    assert "made with another" not in tlcapture("capture", *words, *rules, "--skip-existing").stderr
    assert "made with another" in tlcapture("capture", *words, "--top-p", 0.8, "--skip-existing").stderr
    tlcapture("capture", *words, "--replay", "--logit-lens")
    assert Capture.open(file).metadata["sampling"]["top_p"] == 0.8
    assert "min_p changes nothing" in tlcapture("capture", *words, "--temperature", 0, "--min-p", 0.1).stderr


def test_a_stop_text_of_many_bytes_is_seen_and_no_part_of_it_may_lie_in_the_prompt() -> None:
    tokenizer = tiny.tokenizer()
    text = "ж" * 40 + "."
    first, *rest = tokenizer("a" + text, add_special_tokens=False)["input_ids"]
    stop = StopTexts(tokenizer, ["never", text])
    assert [stop.is_completed(first, rest[: at + 1]) for at in range(len(rest))] == [False] * (len(rest) - 1) + [True]
    one, *others = tokenizer("ab.", add_special_tokens=False)["input_ids"]
    assert not StopTexts(tokenizer, ["ab", "a"]).is_completed(one, others)
    assert StopTexts(tokenizer, ["ab", "b."]).is_completed(one, others)
