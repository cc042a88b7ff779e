"""Checks of contrastive examples without a model: duplicates, and cues that reveal the side without the trait.

    checks = check_examples([read_examples(datasets, trait) for trait in datasets.traits()])

A vector found from examples whose positive side is longer, or about other topics, follows length or topic. Each cue is
therefore scored as a detector of the side: the area under its curve (AUROC) is how often a positive example has more of
it than a negative one, 0.5 if the cue is uninformative. `surface_cues` holds the measures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tlcapture.extraction.examples import Examples, LabelledExample, content
from tlcapture.extraction.surface_cues import (
    Labels,
    Values,
    area_under_curve,
    chance_interval,
    characters,
    characters_a_word,
    held_out_words_auroc,
    share_in_pairs,
    tokens,
    word_classifier,
    words,
)
from tlcapture.names import Trait

BOUNDS = (0.35, 0.65)
"""For lengths, over all examples and within pairs, and for what the prompt's words reveal: nearly three standard
deviations of chance for 64 examples a side."""

OTHER_WORDS_BOUNDS = (0.25, 0.75)
"""For the words of another trait's examples: wider, since each trait is compared with all others in both directions."""

LENGTHS = {"characters": characters, "tokens": tokens, "words": words, "characters a word": characters_a_word}
BY_PROMPT = "by prompt"
BY_RESPONSE = "by response"
OTHER_WORDS = "other traits' words"
_STYLE = "style"


@dataclass(frozen=True)
class Cue:
    """How well one cue detects the side of an example.

    Attributes:
        auroc: 0 to 1; 0.5 is chance, and below 0.5 the negative side has more of it. `None`: does not apply.
        in_pairs: the share of pairs whose positive example has more of it; `None` for words, and without pairs.
        bounds: the allowed range; `None` for a cue that is only reported.
        of: for `OTHER_WORDS`, the other trait and the direction.
    """

    name: str
    auroc: float | None
    in_pairs: float | None = None
    bounds: tuple[float, float] | None = BOUNDS
    of: str = ""

    @property
    def leaks(self) -> bool:
        """Whether the cue is out of bounds, over all examples or within pairs."""
        return not all(self._within(value) for value in (self.auroc, self.in_pairs))

    def _within(self, value: float | None) -> bool:
        return value is None or self.bounds is None or self.bounds[0] <= value <= self.bounds[1]


@dataclass(frozen=True)
class ExampleCheck:
    """The findings on one trait's examples: counts, whether any has a response of its own, and its cues by name."""

    trait: Trait
    n_positive: int
    n_negative: int
    n_pairs: int
    duplicates: int
    have_responses: bool
    cues: dict[str, Cue]

    @property
    def concerns(self) -> list[str]:
        """The problems of the examples, one line each."""
        found = [f"{self.duplicates} examples occur twice"] if self.duplicates else []
        return found + [self._concern(cue) for cue in self.cues.values() if cue.leaks]

    def _concern(self, cue: Cue) -> str:
        low, high = cue.bounds or (0.0, 1.0)
        chance = "by chance {:.2f} to {:.2f}".format(*chance_interval(self.n_positive, self.n_negative))
        in_pairs = "" if cue.in_pairs is None else f", more in {cue.in_pairs:.2f} of the pairs"
        what = f"{cue.name} ({cue.of})" if cue.of else cue.name
        found = f"{what}: AUROC {cue.auroc:.2f}{in_pairs}, expected {low:.2f} to {high:.2f} ({chance})"
        return f"{found}: {self._advice(cue)}"

    def _advice(self, cue: Cue) -> str:
        """How to change examples whose sides a cue tells apart."""
        if cue.name == OTHER_WORDS:
            return "use the words of both traits on both sides"
        if cue.name == BY_PROMPT:
            same = "give both sides the same prompts"
            return same if self.have_responses else "use the same words in the prompts of both sides"
        low, high = BOUNDS
        found = cue.auroc if cue.auroc is not None and not low <= cue.auroc <= high else cue.in_pairs
        side = "positive" if (found or 0) > (low + high) / 2 else "negative"
        if cue.name.startswith("prompt"):
            return f"the prompts of {side} examples are longer: give both sides the same prompts"
        what = "longer words" if cue.name == "characters a word" else f"more {cue.name}"
        return f"{side} examples have {what}: lengthen the other side or shorten this one in some pairs"


def check_examples(chosen: Sequence[Examples], others: Sequence[Examples] = ()) -> list[ExampleCheck]:
    """Check the examples of the chosen traits, and their words against the words of all chosen and other traits."""
    every = [_Vocabulary(each, word_classifier(_texts(each.items), _labels(each.items))) for each in (*chosen, *others)]
    return [_check(own, [each for each in every if each is not own]) for own in every[: len(chosen)]]


@dataclass(frozen=True, eq=False)
class _Vocabulary:
    """A trait's examples, and the classifier of their words."""

    examples: Examples
    classify: Callable[[Sequence[str]], Values]

    def on(self, other: _Vocabulary) -> float:
        """How well these words tell the sides of another trait's examples apart, as an AUROC."""
        items = other.examples.items
        return area_under_curve(self.classify(_texts(items)), _labels(items))


def _check(own: _Vocabulary, others: Sequence[_Vocabulary]) -> ExampleCheck:
    examples = own.examples
    items = examples.items
    labels = _labels(items)
    pairs = {side: {i.example.pair for i in items if i.positive == side and i.example.pair} for side in (True, False)}
    return ExampleCheck(
        trait=examples.trait,
        n_positive=int(labels.sum()),
        n_negative=int((~labels).sum()),
        n_pairs=len(pairs[True] & pairs[False]),
        duplicates=_duplicates(items),
        have_responses=any(item.example.response for item in items),
        cues={cue.name: cue for cue in (*_lengths(examples), *_words(examples, labels), _worst(own, others))},
    )


def _lengths(examples: Examples) -> Iterable[Cue]:
    """The lengths of responses, and the characters of prompts where they differ between the sides."""
    items = examples.items
    labels, texts = _labels(items), _texts(items)
    pairs = [item.example.pair for item in items]
    for name, measure in LENGTHS.items():
        values = np.array([measure(text) for text in texts], dtype=float)
        only_reported = examples.trait.category == _STYLE and name == "characters a word"
        bounds = None if only_reported else BOUNDS
        yield Cue(name, area_under_curve(values, labels), share_in_pairs(values, labels, pairs), bounds)
    if any(item.example.response for item in items):
        values = np.array([characters(text) for text in _prompts(items)], dtype=float)
        yield Cue("prompt's characters", area_under_curve(values, labels), share_in_pairs(values, labels, pairs))


def _words(examples: Examples, labels: Labels) -> Iterable[Cue]:
    items, groups = examples.items, examples.groups
    prompts = _prompts(items)
    yield Cue(BY_PROMPT, held_out_words_auroc(prompts, labels, groups) if any(prompts) else None)
    yield Cue(BY_RESPONSE, held_out_words_auroc(_texts(items), labels, groups), bounds=None)


def _worst(own: _Vocabulary, others: Sequence[_Vocabulary]) -> Cue:
    """The AUROC farthest from 0.5 of another trait's words on these examples, or of their words on another trait's.

    A trait that shares examples with this one is left out: it is the same trait under another name.
    """
    found: list[tuple[float, str]] = []
    examples = {item.example for item in own.examples.items}
    for other in others:
        if examples.isdisjoint(item.example for item in other.examples.items):
            found.append((other.on(own), f"of {other.examples.trait} on these"))
            found.append((own.on(other), f"these on {other.examples.trait}"))
    worst, of = max(found, key=lambda each: abs(each[0] - 0.5), default=(None, ""))
    return Cue(OTHER_WORDS, worst, bounds=OTHER_WORDS_BOUNDS, of=of)


def _labels(items: Sequence[LabelledExample]) -> Labels:
    return np.array([item.positive for item in items])


def _prompts(items: Sequence[LabelledExample]) -> list[str]:
    return [item.example.prompt or "" for item in items]


def _texts(items: Sequence[LabelledExample]) -> list[str]:
    """The texts that activations are read from: the response, the bare text, or a prompt without a response."""
    return [item.example.text or item.example.response or item.example.prompt or "" for item in items]


def _duplicates(items: Sequence[LabelledExample]) -> int:
    """How many examples repeat another one of either side, ignoring case and white space."""
    return sum(count - 1 for count in Counter(content(item.example) for item in items).values())
