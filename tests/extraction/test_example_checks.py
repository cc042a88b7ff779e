"""What reveals the side of contrastive examples: lengths, single words, and the words of other traits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from tlcapture.extraction import example_checks, surface_cues
from tlcapture.extraction.example_checks import (
    BY_PROMPT,
    BY_RESPONSE,
    OTHER_WORDS,
    ExampleCheck,
    check_examples,
)
from tlcapture.extraction.examples import Example, Examples, LabelledExample, read_examples
from tlcapture.extraction.surface_cues import area_under_curve, chance_interval, held_out_words_auroc, share_in_pairs
from tlcapture.names import Trait
from tlcapture.storage.experiments.datasets import Datasets

N_PAIRS = 40
Respond = Callable[[int], str]
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def topic(number: int) -> str:
    """A word that stands for a pair's own topic and occurs nowhere else."""
    return _LETTERS[number % 26] * 3 + _LETTERS[number // 26] * 3


def made(positive: Respond, negative: Respond, name: str = "tone/made", prompt: Respond = topic) -> Examples:
    items = [
        LabelledExample(Example(pair=f"{n}", prompt=prompt(n), response=respond(n)), side, held_out=False)
        for side, respond in ((True, positive), (False, negative))
        for n in range(N_PAIRS)
    ]
    return Examples(Trait.parse(name), items)


def checked(examples: Examples, *others: Examples) -> ExampleCheck:
    return check_examples([examples], others)[0]


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2))
def test_the_area_is_scikit_learns_with_ties_counting_half(rows: list[tuple[int, bool]]) -> None:
    scores, labels = (np.array(column) for column in zip(*rows, strict=True))
    expected = 0.5 if len(set(labels.tolist())) < 2 else roc_auc_score(labels, scores)
    assert area_under_curve(scores.astype(float), labels) == pytest.approx(expected)


def test_the_share_of_pairs_counts_ties_half_and_leaves_out_single_examples() -> None:
    scores = np.array([3.0, 1.0, 2.0, 2.0, 9.0, 0.0])
    labels = np.array([True, False, True, False, True, False])
    assert share_in_pairs(scores, labels, ["a", "a", "b", "b", "c", None]) == 0.75
    assert share_in_pairs(scores, labels, [None] * 6) is None


def test_the_chance_interval_holds_95_percent_of_shuffled_labels() -> None:
    low, high = chance_interval(64, 64)
    rng = np.random.default_rng(0)
    labels = np.arange(128) < 64
    areas = [area_under_curve(rng.random(128), rng.permutation(labels)) for _ in range(2000)]
    assert 0.93 < np.mean([low <= area <= high for area in areas]) < 0.97


def test_prompts_that_are_the_same_on_both_sides_tell_exactly_nothing() -> None:
    found = checked(made(lambda n: f"yes {topic(n)}", lambda n: f"no {topic(n)}"))
    assert found.cues[BY_PROMPT].auroc == 0.5
    assert found.cues[BY_RESPONSE].auroc == 1.0


def test_words_of_the_topic_that_occur_on_one_side_only_are_found_and_others_are_not() -> None:
    def topics(side: bool, n: int) -> str:
        return "cats" if side else "stocks"

    labels = np.array([n % 2 == 0 for n in range(40)])
    groups = [str(n // 2) for n in range(40)]
    assert held_out_words_auroc([topics(bool(label), n) for n, label in enumerate(labels)], labels, groups) == 1.0
    assert held_out_words_auroc([topic(n) for n in range(40)], labels, groups) == 0.5


@pytest.mark.parametrize(
    ("positive", "cue"),
    [
        ("commensurate understanding", "characters"),
        ("a b c d e f g", "words"),
        ("commensurate understanding", "characters a word"),
        ("x, y. z; u!", "tokens"),
    ],
)
def test_each_length_is_checked_by_itself(positive: str, cue: str) -> None:
    found = checked(made(lambda n: f"{positive} {n}", lambda n: f"short words {n}"))
    assert found.cues[cue].auroc == 1.0
    (concern,) = [each for each in found.concerns if each.startswith(f"{cue}: ")]
    assert "AUROC 1.00, more in 1.00 of the pairs, expected 0.35 to 0.65" in concern
    more = "longer words" if cue == "characters a word" else f"more {cue}"
    assert concern.endswith(f"positive examples have {more}: lengthen the other side or shorten this one in some pairs")


def test_more_characters_in_as_many_words_are_no_longer_overlooked() -> None:
    found = checked(made(lambda n: f"commensurate understanding {n}", lambda n: f"short words {n}"))
    assert found.cues["words"].auroc == 0.5
    assert found.cues["characters"].leaks


def test_in_style_the_length_of_words_is_only_reported() -> None:
    def shape(side: bool) -> Respond:
        long, short = "considerable", "the old cat"
        return lambda n: " ".join([long if side else short] * (2 if (n % 2 == 0) == side else 1))

    plain, style = (checked(made(shape(True), shape(False), name)) for name in ("tone/made", "style/made"))
    assert "characters a word" in " ".join(plain.concerns)
    assert style.cues["characters a word"].auroc == plain.cues["characters a word"].auroc == 1.0
    assert "characters a word" not in " ".join(style.concerns)


def test_a_small_difference_in_every_pair_is_found_although_pairs_differ_more() -> None:
    found = checked(made(lambda n: "x" * (10 * n + 2), lambda n: "y" * (10 * n + 1)))
    cue = found.cues["characters"]
    assert cue.auroc is not None
    assert 0.4 < cue.auroc < 0.6
    assert cue.in_pairs == 1.0
    assert cue.leaks


def test_words_of_pairs_that_repeat_others_are_not_learned_from_these() -> None:
    found = checked(made(lambda n: f"x{n % 20}", lambda n: f"y{n % 20}", prompt=lambda n: topic(n % 20)))
    assert (found.duplicates, found.cues[BY_RESPONSE].auroc) == (2 * 20, 0.5)


def test_two_traits_whose_words_tell_each_other_apart_are_confounded() -> None:
    warm = made(lambda n: f"dear {topic(n)} friend", lambda n: f"cold {topic(n)} stone", "tone/warm")
    kind = made(lambda n: f"{topic(n)} my friend", lambda n: f"{topic(n)} my stone", "tone/kind")
    other = made(lambda n: f"{topic(n)} rose", lambda n: f"{topic(n)} lily", "tone/other")
    confounded, free = checked(warm, kind, other).cues[OTHER_WORDS], checked(warm, other).cues[OTHER_WORDS]
    assert (confounded.auroc, confounded.leaks) == (1.0, True)
    assert "tone/kind" in confounded.of
    assert (free.auroc, free.leaks) == (0.5, False)


def test_a_single_trait_is_compared_with_no_other() -> None:
    examples = made(lambda n: f"a {n}", lambda n: f"b {n}")
    assert checked(examples).cues[OTHER_WORDS].auroc is None
    assert checked(examples, Examples(Trait.parse("tone/copy"), examples.items)).cues[OTHER_WORDS].auroc is None


def test_longer_prompts_on_one_side_are_a_leak_too() -> None:
    items = made(lambda n: f"a {n}", lambda n: f"b {n}").items
    more = [item.example.model_copy(update={"prompt": f"{item.example.prompt} and more"}) for item in items]
    longer = [
        LabelledExample(example if item.positive else item.example, item.positive, held_out=False)
        for item, example in zip(items, more, strict=True)
    ]
    assert checked(Examples(Trait.parse("tone/made"), longer)).cues["prompt's characters"].leaks


def test_prompts_without_responses_have_to_differ_so_that_no_advice_is_to_make_them_equal() -> None:
    items = made(lambda n: f"take {n}", lambda n: f"give {n}", prompt=lambda n: "why?").items
    asked = [
        LabelledExample(Example(prompt=item.example.response, pair=item.example.pair), item.positive, held_out=False)
        for item in items
    ]
    (concern,) = checked(Examples(Trait.parse("tone/made"), asked)).concerns
    assert concern.startswith("by prompt: AUROC 1.00")
    assert concern.endswith(": use the same words in the prompts of both sides")


def test_duplicates_are_found_whatever_their_blanks_and_capitals() -> None:
    found = checked(made(lambda n: "  Same TEXT " if n else "same text", lambda n: f"b {n}", prompt=lambda n: "why?"))
    assert found.duplicates == N_PAIRS - 1
    assert found.concerns[0] == "39 examples occur twice"


def test_without_the_tokenizer_words_and_marks_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surface_cues, "embedded_tokenizer", lambda: None)
    assert surface_cues.tokens("Well, isn't it?") == len(["Well", ",", "isn", "'", "t", "it", "?"])


def test_the_shipped_examples_pass_without_the_tokenizer_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With it they pass in the test of `traits check`; only their lengths can differ."""
    monkeypatch.setattr(surface_cues, "embedded_tokenizer", lambda: None)
    datasets = Datasets(tmp_path)
    shipped = [read_examples(datasets, trait) for trait in datasets.traits()]
    assert len(shipped) == 10
    cues = {str(each.trait): {cue.name: cue.leaks for cue in example_checks._lengths(each)} for each in shipped}
    assert all("tokens" in found and not any(found.values()) for found in cues.values()), cues
    for each in shipped:
        sides = [{i.example.pair for i in each.items if i.positive == side} for side in (True, False)]
        assert sides[0] == sides[1] and len(sides[0]) == 64 and len(each.items) == 128


def test_the_outlook_of_positivity_is_independent_of_events_and_lengths(tmp_path: Path) -> None:
    sides: dict[bool, dict[str, Example]] = {True: {}, False: {}}
    for item in read_examples(Datasets(tmp_path), Trait("affect", "positivity")).items:
        sides[item.positive][str(item.example.pair)] = item.example
    assert {pair: each.prompt for pair, each in sides[True].items()} == {
        pair: each.prompt for pair, each in sides[False].items()
    }
    longer = {
        int(pair): len(str(each.response)) > len(str(sides[False][pair].response)) for pair, each in sides[True].items()
    }
    # In odd pairs something bad happens, in the others something good, or in multiples of four nothing in particular.
    for kind in ([1, 3], [2], [0]):
        assert np.mean([longer[pair] for pair in longer if pair % 4 in kind]) == 0.5
