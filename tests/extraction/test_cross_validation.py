"""Many fits at once against single ones; nested cross-validation and its null on planted and on shuffled data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tlcapture.extraction.baselines import Baseline, _gain_interval, _resampled_aurocs, text_baselines, verdict
from tlcapture.extraction.cross_validation import (
    cross_validate,
    farthest_of_given,
    folds,
    largest_of_fitted,
    relabelled,
)
from tlcapture.extraction.evaluation import auroc
from tlcapture.extraction.many_fits import Span
from tlcapture.extraction.methods import FITS

PAIRS = 32
GROUPS = [f"pair {number}" for number in range(PAIRS)] * 2
LABELS = torch.arange(2 * PAIRS) < PAIRS


def examples(*strengths: float, d_model: int = 24, seed: int = 0) -> Tensor:
    """Pairs of one topic each; layer by layer, the sides are apart along one direction by a strength."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randn(len(strengths), PAIRS, d_model, generator=generator)
    noise = torch.randn(len(strengths), 2 * PAIRS, d_model, generator=generator)
    apart = torch.tensor(strengths)[:, None, None] * torch.where(LABELS, 0.5, -0.5)[None, :, None]
    return torch.cat([topics, topics], dim=1) + noise + apart * torch.eye(d_model)[0]


@pytest.mark.parametrize("method", list(FITS))
@pytest.mark.parametrize("d_model", [16, 200])
def test_fits_in_the_span_project_as_single_fits_do(method: str, d_model: int) -> None:
    """In fewer dimensions than there are examples, and in more; for two folds and two labellings."""
    activations = examples(2.0, 0.5, d_model=d_model)
    training = torch.stack([torch.arange(2 * PAIRS) % 5 != fold for fold in range(2)])
    labellings = relabelled(LABELS, GROUPS, 2, seed=3)
    scores = Span.of(activations).scores(method, training, labellings)
    for fold, rows in enumerate(training):
        for number, labels in enumerate(labellings):
            vectors = FITS[method](activations[:, rows], labels[rows])
            expected = torch.einsum("lnd,ld->ln", activations, vectors)
            expected = expected - expected.mean(dim=1, keepdim=True)
            found = scores[fold, number] - scores[fold, number].mean(dim=1, keepdim=True)
            assert torch.nn.functional.cosine_similarity(found, expected, dim=1).min() > 0.999


def test_folds_leave_out_whole_pairs_once() -> None:
    left_out = folds(GROUPS, LABELS, 5)
    assert (left_out.sum(dim=0) == 1).all()
    assert (left_out[:, :PAIRS] == left_out[:, PAIRS:]).all()
    assert left_out.sum(dim=1).max() - left_out.sum(dim=1).min() <= 2


def test_unpaired_examples_are_dealt_by_side() -> None:
    groups = [f"single {number}" for number in range(2 * PAIRS)]
    left_out = folds(groups, LABELS, 4)
    assert all(6 <= int((row & LABELS).sum()) <= 10 for row in left_out)


def test_relabelling_exchanges_within_pairs_and_shuffles_single_examples() -> None:
    drawn = relabelled(LABELS, GROUPS, 200)
    assert (drawn[:, :PAIRS] != drawn[:, PAIRS:]).all()
    assert 0.4 < drawn[:, :PAIRS].float().mean() < 0.6
    single = relabelled(LABELS, [f"single {number}" for number in range(2 * PAIRS)], 200)
    assert (single.sum(dim=1) == PAIRS).all()
    assert 0.4 < single[:, :PAIRS].float().mean() < 0.6


def test_examples_without_a_partner_that_repeat_one_another_have_one_label() -> None:
    groups = [f"single {number // 2}" for number in range(2 * PAIRS)]
    drawn = relabelled(LABELS, groups, 200)
    assert torch.equal(drawn[:, ::2], drawn[:, 1::2])
    assert (drawn.sum(dim=1) == PAIRS).all()


def test_the_layer_with_the_trait_is_chosen_and_scored_on_other_pairs() -> None:
    grid = {method: range(4) for method in FITS}
    found = cross_validate(Span.of(examples(0.0, 0.5, 4.0, 0.0)), LABELS, GROUPS, grid)
    assert {layer for _, layer in found.nested.chosen} == {2}
    assert found.nested.auroc > 0.95
    assert 2.5 < found.nested.effect_size < 5
    assert found.auroc["mean_diff"][2] > 0.95
    assert found.auroc["mean_diff"][0] < 0.75


def test_the_nested_score_of_noise_is_chance_where_the_best_of_many_is_not() -> None:
    grid = {"mean_diff": range(30)}
    nested, best = [], []
    for seed in range(12):
        found = cross_validate(Span.of(examples(*[0.0] * 30, seed=seed)), LABELS, GROUPS, grid)
        nested.append(found.nested.auroc)
        best.append(float(found.auroc["mean_diff"].max()))
    assert abs(sum(nested) / 12 - 0.5) < 0.06
    assert sum(best) / 12 > 0.6


def test_the_null_is_as_large_as_the_best_of_noise_and_smaller_than_a_trait() -> None:
    grid = {"mean_diff": range(10), "probe": range(10)}
    held_out = torch.arange(2 * PAIRS) % PAIRS < 7
    ranks = []
    for seed in range(20):
        span = Span.of(examples(*[0.0] * 10, seed=seed))
        best = largest_of_fitted(span, LABELS, GROUPS, held_out, grid, seed=seed)
        observed = max(_held_out_auroc(span, method, held_out) for method in grid)
        ranks.append(float((best >= observed).float().mean()))
    assert sum(rank <= 0.05 for rank in ranks) <= 4
    assert 0.3 < sum(ranks) / 20 < 0.8
    strong = Span.of(examples(*[5.0] * 10))
    best = largest_of_fitted(strong, LABELS, GROUPS, held_out, grid)
    assert (best >= _held_out_auroc(strong, "mean_diff", held_out)).float().mean() < 0.05


def _held_out_auroc(span: Span, method: str, held_out: Tensor) -> float:
    scores = span.scores(method, ~held_out[None], LABELS[None])[0, 0]
    return float(auroc(scores[:, held_out], LABELS[held_out]).max())


def test_words_and_lengths_are_scored_by_the_same_folds() -> None:
    words = ["yes indeed" if label else "no" for label in LABELS]
    outer = folds(GROUPS, LABELS, 5)
    found = {each.name: each.auroc for each in text_baselines(words, [2] * len(words), LABELS, outer)}
    assert found == {"bag of words": 1.0, "characters": 1.0, "tokens": 0.5, "characters a word": 1.0}


@pytest.mark.parametrize(("strength", "words", "text"), [
    (4.0, 0.5, "adds +0."), (4.0, 5.0, "adds nothing over words (1.000) that these examples can show"),
    (0.0, 0.5, "no better than vectors of shuffled labels (p = 0.50)"),
])  # fmt: skip
def test_the_verdict_compares_with_the_best_baseline(strength: float, words: float, text: str) -> None:
    outer = folds(GROUPS, LABELS, 5)
    nested = cross_validate(Span.of(examples(strength)), LABELS, GROUPS, {"mean_diff": [0]}).nested
    generator = torch.Generator().manual_seed(1)
    scores = words * LABELS + 0.3 * torch.randn(len(LABELS), generator=generator) if words > 1 else torch.zeros(64)
    baseline = Baseline.of("words", scores, LABELS, outer)
    found = verdict(nested, [baseline], LABELS, GROUPS, 0.005 if strength else 0.5)
    assert found.text.startswith(text)


def test_the_interval_of_a_gain_is_wider_than_that_of_pairs_alone() -> None:
    """A bootstrap takes the fits for given; without a gain, one in twelve intervals of 2.5 % a side lay above 0."""
    nested = cross_validate(Span.of(examples(1.0, 1.0)), LABELS, GROUPS, {"mean_diff": [0, 1]}).nested
    baseline = Baseline("layer 0", 0.5, torch.zeros(len(LABELS)))
    found = verdict(nested, [baseline], LABELS, GROUPS, 0.005)
    percentiles = _gain_interval(nested, baseline, LABELS, GROUPS, 0)
    assert found.interval == pytest.approx([found.gain + 1.5 * (each - found.gain) for each in percentiles])
    assert percentiles[0] < found.gain < percentiles[1]


def test_the_farthest_auroc_of_a_labelling_is_that_of_numpy() -> None:
    """Of several vectors, in either direction, where labels are exchanged within pairs."""
    scores = torch.randn(3, len(LABELS), generator=torch.Generator().manual_seed(2))
    expected = []
    for labels in relabelled(LABELS, GROUPS).numpy():
        aurocs = [np.mean(each[labels][:, None] > each[~labels]) for each in scores.numpy()]
        expected.append(max(abs(each - 0.5) for each in aurocs))
    assert np.allclose(farthest_of_given(scores, LABELS, GROUPS), expected, atol=1e-6)


def test_a_resampled_auroc_is_that_of_the_examples_as_often_as_they_are_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    labels, scores = torch.arange(12) < 4, torch.randint(0, 5, (12,), generator=generator).float()
    times = torch.randint(0, 3, (20, 12), generator=generator)
    times[:, [0, 11]] += 1
    drawn = [torch.arange(12).repeat_interleave(row) for row in times]
    expected = torch.stack([auroc(scores[each], labels[each]) for each in drawn])
    assert torch.equal(_resampled_aurocs(scores, labels, times.double()), expected)


def test_too_few_examples_cannot_be_left_out_twice() -> None:
    groups, labels = ["a", "b", "a", "b"], torch.tensor([True, True, False, False])
    with pytest.raises(ValueError, match="too few examples"):
        cross_validate(Span.of(torch.randn(2, 4, 8)), labels, groups, {"mean_diff": [0, 1]})
