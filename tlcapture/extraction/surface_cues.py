"""Cues that tell positive from negative examples without their meaning: their lengths, and single words.

    area_under_curve(lengths, labels)              # does one side have the longer texts?
    held_out_words_auroc(texts, labels, groups)    # the side, guessed from single words, by cross-validation
    word_classifier(texts, labels)(others)         # the words of some texts, applied to others

A score is larger for texts that look positive. Scores are rounded to 9 digits, so that equal texts tie exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FOLDS = 5
_TOKEN = re.compile(r"\w+|[^\w\s]")

Labels = Bool[np.ndarray, " n"]
Values = Float[np.ndarray, " n"]


def characters(text: str) -> float:
    """How many characters a text has, without white space at its ends."""
    return float(len(text.strip()))


def words(text: str) -> float:
    """How many words a text has, split at white space."""
    return float(len(text.split()))


def characters_a_word(text: str) -> float:
    """The mean length of a text's words, their punctuation included; 0 without words."""
    parts = text.split()
    return sum(map(len, parts)) / len(parts) if parts else 0.0


def tokens(text: str) -> float:
    """The number of tokens of a text in the embedded model's tokenizer, or of words and marks where it is missing."""
    tokenizer = embedded_tokenizer()
    return float(len(tokenizer.encode(text, add_special_tokens=False).ids if tokenizer else _TOKEN.findall(text)))


@cache
def embedded_tokenizer() -> Tokenizer | None:
    """The tokenizer of the embedded model, read without torch; `None` before the model's first use."""
    from tlcapture.errors import ModelError
    from tlcapture.models.checkpoints.embedded import embedded_folder, is_converted

    try:
        if not is_converted():
            return None
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(embedded_folder() / "tokenizer.json"))
    except ModelError:
        return None


def area_under_curve(scores: Values, labels: Labels) -> float:
    """How often a positive example has a larger score than a negative one, ties counting half (Hanley and McNeil 1982).

    It is 0.5 where a side is empty.
    """
    return _mean_win(*_wins(scores, labels))


def share_in_pairs(scores: Values, labels: Labels, pairs: Sequence[str | None]) -> float | None:
    """The share of pairs whose positive example has the larger score, ties counting half; `None` without pairs.

    A side's score is the mean over its examples of the pair.
    """
    sides: dict[str, tuple[list[float], list[float]]] = {}
    for score, label, pair in zip(scores, labels, pairs, strict=True):
        if pair is not None:
            sides.setdefault(pair, ([], []))[int(label)].append(float(score))
    gaps = [np.mean(positive) - np.mean(negative) for negative, positive in sides.values() if positive and negative]
    return float(np.mean(np.sign(np.round(gaps, 9)) / 2 + 0.5)) if gaps else None


def chance_interval(n_positive: int, n_negative: int) -> tuple[float, float]:
    """The range of 95 % of the areas if the sides do not differ (normal approximation; Mann and Whitney
    1947)."""
    half = 1.96 * float(np.sqrt((n_positive + n_negative + 1) / (12 * max(n_positive * n_negative, 1))))
    return max(0.0, 0.5 - half), min(1.0, 0.5 + half)


def held_out_words_auroc(texts: Sequence[str], labels: Labels, groups: Sequence[str]) -> float:
    """The area under the curve of single words: each text scored by the words of texts from other groups.

    Only texts of one fold are compared, since each fold has its own classifier. It is 0.5 where nothing can be learned.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    n_folds = min(FOLDS, len(set(groups)), int(labels.sum()), int((~labels).sum()))
    if n_folds < 2:
        return 0.5
    won = compared = 0.0
    folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=0)
    for train, test in folds.split(np.zeros(len(labels)), labels, groups):
        scores = word_classifier([texts[n] for n in train], labels[train])([texts[n] for n in test])
        wins, pairs = _wins(scores, labels[test])
        won, compared = won + wins, compared + pairs
    return _mean_win(won, compared)


def word_classifier(texts: Sequence[str], labels: Labels) -> Callable[[Sequence[str]], Values]:
    """A bag-of-words classifier: from texts to the log odds that each of them is positive.

    A bag of words says which words occur, not how often; the classifier is logistic regression, with scikit-learn's
    default penalty. All its scores are 0 where nothing can be learned: only one side, or no words.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    if len(set(labels.tolist())) < 2 or not any(re.search(r"\w", text) for text in texts):
        return lambda others: np.zeros(len(others))
    vectorizer = CountVectorizer(token_pattern=r"\w+", binary=True).fit(texts)
    model = LogisticRegression(max_iter=1000, tol=1e-8).fit(vectorizer.transform(texts), labels)
    weights, bias = np.round(model.coef_[0], 6), float(model.intercept_[0])
    return lambda others: np.round(vectorizer.transform(others) @ weights + bias, 9)


def _wins(scores: Values, labels: Labels) -> tuple[float, float]:
    """How many comparisons of a positive with a negative example the positive one wins, and how many there are."""
    from scipy.stats import rankdata

    n_positive = int(labels.sum())
    won = rankdata(scores)[labels].sum() - n_positive * (n_positive + 1) / 2 if len(scores) else 0.0
    return float(won), float(n_positive * (len(labels) - n_positive))


def _mean_win(won: float, compared: float) -> float:
    return won / compared if compared else 0.5
