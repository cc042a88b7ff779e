"""Checks of contrastive examples without a model: duplicates, length, and topics that reveal the side."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tlcapture.extraction.examples import Examples, LabelledExample

_FOLDS = 5
_SURE = 0.8
_IMBALANCE = 1.25
_LEAK = 0.65


@dataclass(frozen=True)
class ExampleCheck:
    """The findings on one trait's examples.

    Attributes:
        length_ratio: mean words of a positive over mean words of a negative response.
        prompt_accuracy: how often a bag-of-words classifier finds the side from the prompt alone, by
            cross-validation over whole pairs; `None` without prompts. Near 0.5, prompts do not reveal the side.
        response_accuracy: how often it finds the side from the response (or text): how far single words show the
            trait.
        leaking_pairs: pairs both of whose prompts it assigns to the right side with a probability over 0.8.
    """

    trait: str
    n_positive: int
    n_negative: int
    n_pairs: int
    duplicates: int
    length_ratio: float
    prompt_accuracy: float | None
    response_accuracy: float
    leaking_pairs: list[str]

    @property
    def concerns(self) -> list[str]:
        """What a user should fix or know of, one line each."""
        found = []
        if self.duplicates:
            found.append(f"{self.duplicates} examples occur twice")
        if not 1 / _IMBALANCE <= self.length_ratio <= _IMBALANCE:
            found.append(f"positive responses have {self.length_ratio:.2f} times as many words as negative ones")
        if self.prompt_accuracy is not None and self.prompt_accuracy > _LEAK:
            found.append(
                f"the side can be guessed from the prompt alone {self.prompt_accuracy:.0%} of the time: the topic leaks"
            )
        return found


def check_examples(examples: Examples) -> ExampleCheck:
    """Check a trait's examples for duplicates, unequal lengths and leaks of topic."""
    items = examples.items
    texts = [item.example.text or item.example.response or item.example.prompt or "" for item in items]
    prompts = [item.example.prompt or "" for item in items]
    sides = {side: {i.example.pair for i in items if i.positive == side and i.example.pair} for side in (True, False)}
    words = {side: [len(t.split()) for t, i in zip(texts, items, strict=True) if i.positive == side] for side in sides}
    prompt_probs = _side_probabilities(prompts, items) if any(prompts) else None
    return ExampleCheck(
        trait=str(examples.trait),
        n_positive=len(words[True]),
        n_negative=len(words[False]),
        n_pairs=len(sides[True] & sides[False]),
        duplicates=sum(count - 1 for count in Counter(zip(prompts, texts, strict=True)).values()),
        length_ratio=float(np.mean(words[True]) / max(np.mean(words[False]), 1e-9)),
        prompt_accuracy=None if prompt_probs is None else float((prompt_probs > 0.5).mean()),
        response_accuracy=float((_side_probabilities(texts, items) > 0.5).mean()),
        leaking_pairs=[] if prompt_probs is None else _leaking(prompt_probs, items),
    )


def _side_probabilities(texts: Sequence[str], items: Sequence[LabelledExample]) -> np.ndarray:
    """The probability that a bag-of-words classifier, trained on other pairs, gives to each text's own side.

    It is 0.5 for texts without words, and if only one side is left to train on.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    labels = np.array([item.positive for item in items])
    groups = [item.example.pair or f"{item.positive} {number}" for number, item in enumerate(items)]
    own = np.full(len(texts), 0.5)
    n_folds = min(_FOLDS, len(set(groups)))
    if n_folds < 2 or not any(re.search(r"\w", text) for text in texts):
        return own
    counts = CountVectorizer(token_pattern=r"\w+", binary=True).fit_transform(texts)
    for train, test in GroupKFold(n_folds).split(counts, labels, groups):
        if len(set(labels[train])) < 2:
            continue
        model = LogisticRegression(max_iter=1000).fit(counts[train], labels[train])
        positive = model.predict_proba(counts[test])[:, 1]
        own[test] = np.where(labels[test], positive, 1 - positive)
    return own


def _leaking(probabilities: np.ndarray, items: Sequence[LabelledExample]) -> list[str]:
    by_pair: dict[str, list[float]] = {}
    for probability, item in zip(probabilities, items, strict=True):
        if item.example.pair:
            by_pair.setdefault(item.example.pair, []).append(float(probability))
    return sorted(pair for pair, both in by_pair.items() if len(both) > 1 and min(both) > _SURE)
