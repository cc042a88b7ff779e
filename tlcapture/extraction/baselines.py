"""Baselines that separate the examples without a model: by their words and lengths, scored as vectors are.

A vector shows something only if it beats them and the embeddings of layer 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tlcapture.extraction.cross_validation import NestedScore, fold_aurocs
from tlcapture.extraction.evaluation import CONFIDENCE, auroc
from tlcapture.extraction.many_fits import Training
from tlcapture.extraction.methods import Labels

BAG_OF_WORDS = "bag of words"
RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Baseline:
    """A score of the examples that uses no layer beyond the first.

    Attributes:
        name: `bag of words`, `layer 0`, `characters`, `tokens` or `characters a word`.
        auroc: the mean of the outer folds.
        scores: each example's score in the fold that left it out, `[n_examples]`.
    """

    name: str
    auroc: float
    scores: Float[Tensor, " n_examples"]

    @classmethod
    def of(cls, name: str, scores: Float[Tensor, " n_examples"], labels: Labels, outer: Training) -> Baseline:
        """A baseline from the scores that each example got in the folds that left it out."""
        return cls(name, float(fold_aurocs(scores, labels, outer).mean()), scores)


def text_baselines(texts: Sequence[str], n_tokens: Sequence[int], labels: Labels, outer: Training) -> list[Baseline]:
    """Words, characters, tokens and characters a word, each held out by the folds of the vectors.

    Args:
        texts: the text that is read out of each example: its response, or its bare text.
        n_tokens: the number of tokens of each.
        outer: the examples that each fold leaves out, `[n_folds, n_examples]`.
    """
    words = [max(1, len(re.findall(r"\w+", text))) for text in texts]
    measures = {
        "characters": [float(len(text)) for text in texts],
        "tokens": [float(number) for number in n_tokens],
        "characters a word": [len(text) / number for text, number in zip(texts, words, strict=True)],
    }
    found = [Baseline.of(BAG_OF_WORDS, bag_of_words(texts, labels, outer), labels, outer)]
    return [*found, *(measured(name, torch.tensor(each), labels, outer) for name, each in measures.items())]


def measured(name: str, values: Float[Tensor, " n_examples"], labels: Labels, outer: Training) -> Baseline:
    """The baseline of one number per example, whose direction each fold takes from its training examples."""
    scores = torch.zeros(len(values))
    for left_out in outer:
        positive, negative = values[~left_out & labels].mean(), values[~left_out & ~labels].mean()
        scores[left_out] = (values[left_out] - (positive + negative) / 2) * (positive - negative).sign()
    return Baseline.of(name, scores, labels, outer)


def bag_of_words(texts: Sequence[str], labels: Labels, outer: Training) -> Float[Tensor, " n_examples"]:
    """The log-odds that a logistic regression on the words of the training examples gives to each left-out text."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    scores = torch.zeros(len(texts))
    if not any(re.search(r"\w", text) for text in texts):
        return scores
    counts = CountVectorizer(token_pattern=r"\w+", binary=True).fit_transform(texts)
    targets = labels.numpy()
    for left_out in outer.numpy():
        if len(set(targets[~left_out])) == 2:
            words = LogisticRegression(max_iter=1000).fit(counts[~left_out], targets[~left_out])
            scores[torch.from_numpy(left_out)] = torch.from_numpy(words.decision_function(counts[left_out])).float()
    return scores


@dataclass(frozen=True, eq=False)
class Verdict:
    """The comparison of a vector with the best baseline.

    Attributes:
        baseline: the baseline with the largest AUROC.
        gain: by how much the nested AUROC is larger, over all examples together.
        interval: of 95 %, by a bootstrap over pairs, widened for the training examples that folds share.
        p: the share of random labellings whose best vector separates as well on the held-out examples.
        text: one line.
    """

    baseline: Baseline
    gain: float
    interval: tuple[float, float]
    p: float
    text: str


def verdict(
    nested: NestedScore,
    baselines: Sequence[Baseline],
    labels: Labels,
    groups: Sequence[str],
    p: float,
    *,
    seed: int = 0,
) -> Verdict:
    """Compare a nested score with the best baseline on the same left-out examples.

    A bootstrap over pairs takes the fits for given, and its interval for the gain of such fits is too narrow: of data
    without a gain, 8 to 12 % had one. Its bounds are moved outwards by `sqrt(1 + k / (k - 1))` for `k` folds, which is
    1.5 for five (Nadeau and Bengio, "Inference for the Generalization Error", 2003).
    """
    best = max(baselines, key=lambda each: each.auroc)
    gain = float(auroc(nested.scores, labels) - auroc(best.scores, labels))
    n_folds = max(2, len(nested.chosen))
    wider = np.sqrt(1 + n_folds / (n_folds - 1))
    low, high = (gain + wider * (each - gain) for each in _gain_interval(nested, best, labels, groups, seed))
    if not p <= 1 - CONFIDENCE:
        text = f"no better than vectors of shuffled labels (p = {p:.2f})"
    elif low > 0:
        text = f"adds {gain:+.3f} AUROC ({low:+.3f} to {high:+.3f}) over {best.name} ({best.auroc:.3f})"
    else:
        text = f"adds nothing over {best.name} ({best.auroc:.3f}) that these examples can show"
    return Verdict(best, gain, (low, high), p, text)


def _gain_interval(
    nested: NestedScore, baseline: Baseline, labels: Labels, groups: Sequence[str], seed: int
) -> tuple[float, float]:
    """The percentiles of the gain over resampled pairs (Efron and Tibshirani, "An Introduction to the Bootstrap")."""
    number_of = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    n_groups = len(number_of)
    drawn = torch.from_numpy(np.random.default_rng(seed).integers(n_groups, size=(RESAMPLES, n_groups)))
    ones = torch.ones(drawn.shape, dtype=torch.float64)
    times_of_group = torch.zeros_like(ones).scatter_add_(1, drawn, ones)
    times = times_of_group[:, [number_of[group] for group in groups]]
    times = times[times[:, labels].any(dim=1) & times[:, ~labels].any(dim=1)]
    if not len(times):
        return float("nan"), float("nan")
    ours, theirs = (_resampled_aurocs(each.scores, labels, times) for each in (nested, baseline))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile((ours - theirs).numpy().astype(np.float64), [tail, 1 - tail])
    return float(low), float(high)


def _resampled_aurocs(
    scores: Float[Tensor, " n_examples"], labels: Labels, times: Float[Tensor, "n_resamples n_examples"]
) -> Float[Tensor, " n_resamples"]:
    """The AUROC of each resample, in which every example counts as often as `times` says."""
    values, rank = scores.unique(return_inverse=True)
    negative = torch.zeros(len(times), len(values), dtype=times.dtype).index_add_(1, rank[~labels], times[:, ~labels])
    below = negative.cumsum(dim=1) - negative / 2  # how many negative examples score lower; ties count half
    won = (times[:, labels] * below[:, rank[labels]]).sum(dim=1)
    return (won / (times[:, labels].sum(dim=1) * times[:, ~labels].sum(dim=1))).float()
