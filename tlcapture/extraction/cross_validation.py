"""Choosing layer and method, and scoring the choice, by nested cross-validation over pairs; the null of relabelling.

Both examples of a pair are always on the same side of a split. The choice (the layer and method with the largest effect
size) is made by cross-validation within the training examples of an outer fold, and scored on the examples that are
left out of it.

Source: Varma and Simon, "Bias in error estimation when using cross-validation for model selection" (2006).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tlcapture.extraction.evaluation import auroc, auroc_error, hedges_g
from tlcapture.extraction.many_fits import Span, Training
from tlcapture.extraction.methods import Labels

OUTER_FOLDS, INNER_FOLDS = 5, 4
RELABELLINGS = 200

PerLayer = Float[Tensor, " n_layers"]
PerLayerScores = Float[Tensor, "n_layers n_examples"]
NullAurocs = Float[Tensor, "n_labellings n_vectors"]


@dataclass(frozen=True, eq=False)
class NestedScore:
    """How well vectors separate pairs that took no part in choosing their layer and method.

    Attributes:
        auroc: the mean of the outer folds; `auroc_sd` is their standard deviation.
        effect_size: Hedges' g of the calibrated scores of all outer folds together.
        chosen: the layer and method that each outer fold chose.
        scores: each example's calibrated score in the fold that left it out, `[n_examples]`.
    """

    auroc: float
    auroc_sd: float
    effect_size: float
    chosen: list[tuple[str, int]]
    scores: Float[Tensor, " n_examples"]


@dataclass(frozen=True, eq=False)
class CrossValidated:
    """Scores of every method and layer by the outer folds, and of the nested choice among them.

    `auroc` and `effect_size` have one value per layer, by method; `layer_0` are each example's scores, by the first
    method, at layer 0 in the fold that left it out.
    """

    auroc: Mapping[str, PerLayer]
    effect_size: Mapping[str, PerLayer]
    nested: NestedScore
    layer_0: Float[Tensor, " n_examples"]


def folds(groups: Sequence[str], labels: Labels, n_folds: int, *, seed: int = 0) -> Bool[Tensor, "n_folds n_examples"]:
    """The examples that each fold leaves out: whole groups, dealt evenly, pairs first.

    There are fewer folds if there are fewer groups.
    """
    generator = torch.Generator().manual_seed(seed)
    names = sorted(set(groups))
    members = {name: [number for number, group in enumerate(groups) if group == name] for name in names}
    kinds: dict[tuple[bool, ...], list[str]] = {}
    for number in torch.randperm(len(names), generator=generator).tolist():
        name = names[number]
        kinds.setdefault(tuple(sorted({bool(labels[each]) for each in members[name]})), []).append(name)
    dealt = [name for kind in sorted(kinds, reverse=True) for name in kinds[kind]]
    left_out = torch.zeros(max(1, min(n_folds, len(names))), len(groups), dtype=torch.bool)
    for number, name in enumerate(dealt):
        left_out[number % len(left_out), members[name]] = True
    return left_out


def cross_validate(
    span: Span, labels: Labels, groups: Sequence[str], grid: Mapping[str, Sequence[int]], *, seed: int = 0
) -> CrossValidated:
    """Nested cross-validation over methods and layers.

    Args:
        grid: the layers among which to choose, by method.

    Raises:
        ValueError: there are not enough examples to leave some out twice.
    """
    outer = folds(groups, labels, OUTER_FOLDS, seed=seed)
    inner = [_inner_folds(groups, labels, left_out, seed) for left_out in outer]
    training = torch.cat([~outer, *(~left_out & ~each for left_out, each in zip(outer, inner, strict=True))])
    if not all(_has_both(row, labels) for row in training):
        raise ValueError("too few examples of a side to leave some out twice")
    by_outer: dict[str, PerLayerScores] = {}
    by_inner: list[dict[str, PerLayerScores]] = [{} for _ in outer]  # of each outer fold
    for method in grid:
        scores = _calibrated(span.scores(method, training, labels[None])[:, 0], training, labels)
        of_outer, *of_inner = scores.split([len(outer), *map(len, inner)])
        by_outer[method] = _left_out_scores(of_outer, outer)
        for number, each in enumerate(of_inner):
            by_inner[number][method] = _left_out_scores(each, inner[number])
    chosen, nested = [], torch.zeros(len(labels))
    for left_out, within in zip(outer, by_inner, strict=True):
        sizes = {method: _effect_size(scores[:, ~left_out], labels[~left_out]) for method, scores in within.items()}
        method, layer = _best(sizes, grid)
        chosen.append((method, layer))
        nested[left_out] = by_outer[method][layer, left_out]
    aurocs = fold_aurocs(nested, labels, outer)
    return CrossValidated(
        auroc={method: fold_aurocs(scores, labels, outer).mean(dim=0) for method, scores in by_outer.items()},
        effect_size={method: _effect_size(scores, labels) for method, scores in by_outer.items()},
        nested=NestedScore(
            auroc=float(aurocs.mean()),
            auroc_sd=float(aurocs.std()) if len(aurocs) > 1 else float("nan"),
            effect_size=float(_effect_size(nested, labels)),
            chosen=chosen,
            scores=nested,
        ),
        layer_0=next(iter(by_outer.values()))[0],
    )


def fold_aurocs(
    scores: Float[Tensor, "*vectors n_examples"], labels: Labels, outer: Training
) -> Float[Tensor, "n_scored_folds ..."]:
    """The AUROC of the examples that each fold leaves out, of all examples together if no fold leaves out both sides.

    `scores` are each example's in the fold that left it out.
    """
    rows = [out for out in outer if _has_both(out, labels)] or [torch.ones_like(labels)]
    return torch.stack([auroc(scores[..., out], labels[out]) for out in rows])


def relabelled(
    labels: Labels, groups: Sequence[str], n_labellings: int = RELABELLINGS, *, seed: int = 0
) -> Bool[Tensor, "n_labellings n_examples"]:
    """Random labellings: labels of a group with both sides are exchanged or not, those of other groups shuffled."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {name: [n for n, group in enumerate(groups) if group == name] for name in dict.fromkeys(groups)}
    drawn = labels.expand(n_labellings, -1).clone()
    single: list[list[int]] = []
    for members in pairs.values():
        if len({bool(labels[member]) for member in members}) == 2:
            exchanged = torch.rand(n_labellings, generator=generator) < 0.5
            drawn[:, members] ^= exchanged[:, None]
        else:
            single.append(members)
    if single:
        order = torch.rand(n_labellings, len(single), generator=generator).argsort(dim=1)
        shuffled = labels[[members[0] for members in single]][order]
        for members, sides in zip(single, shuffled.T, strict=True):
            drawn[:, members] = sides[:, None]
    return drawn


def largest_of_fitted(
    span: Span,
    labels: Labels,
    groups: Sequence[str],
    held_out: Labels,
    grid: Mapping[str, Sequence[int]],
    *,
    seed: int = 0,
) -> Float[Tensor, " n_labellings"]:
    """The largest held-out AUROC over all methods and layers of the grid, for each of 200 random labellings.

    Every labelling is fitted on the training examples and scored on the held-out ones, as the vectors are. Where the
    sides differ in number, AUROCs are spread as in `null_aurocs`.
    """
    drawn = torch.cat([labels[None], _relabelled_on_both(labels, groups, held_out, seed)])
    found = []
    for method, layers in grid.items():
        scores = span.scores(method, ~held_out[None], drawn)[0][:, list(layers)][..., held_out]
        null = torch.stack([auroc(of_labels, each[held_out]) for of_labels, each in zip(scores, drawn, strict=True)])
        found.append(_spread(null[1:], scores[0], labels[held_out]))
    return torch.cat(found, dim=1).amax(dim=1)


def largest_of_given(
    scores: Float[Tensor, "n_vectors n_examples"],
    labels: Labels,
    groups: Sequence[str],
    held_out: Labels,
    *,
    seed: int = 0,
) -> Float[Tensor, " n_labellings"]:
    """The largest held-out AUROC of vectors that were not fitted to the examples, for each of 200 labellings."""
    drawn = _relabelled_on_both(labels, groups, held_out, seed)
    return null_aurocs(scores[:, held_out], labels[held_out], drawn[:, held_out]).amax(dim=1)


def farthest_of_given(
    scores: Float[Tensor, "n_vectors n_examples"], labels: Labels, groups: Sequence[str], *, seed: int = 0
) -> Float[Tensor, " n_labellings"]:
    """How far from 0.5 the farthest AUROC of vectors not fitted to the examples is, for each of 200 labellings."""
    drawn = relabelled(labels, groups, RELABELLINGS, seed=seed)
    return (null_aurocs(scores, labels, drawn) - 0.5).abs().amax(dim=1)


def null_aurocs(
    scores: Float[Tensor, "n_vectors n_examples"], labels: Labels, drawn: Bool[Tensor, "n_labellings n_examples"]
) -> NullAurocs:
    """The AUROC of each vector by each of several labellings, for a comparison with that by the true labels.

    Labellings mix the sides. If one side has fewer examples than the other and its scores vary more, an AUROC by the
    true labels varies more than theirs, although the vector separates nothing: for 8 against 32 examples of a third of
    their deviation, it exceeds 95 % of theirs in 13 % of cases. Where the sides differ in number, AUROCs are therefore
    spread about 0.5 by as much as the standard error of the true one (DeLong et al. 1988) exceeds their deviation.
    """
    found = torch.stack([auroc(scores, each) for each in (labels, *drawn)])
    return _spread(found[1:], scores, labels)


def _spread(null: NullAurocs, scores: Float[Tensor, "n_vectors n_examples"], labels: Labels) -> NullAurocs:
    if 2 * int(labels.sum()) == len(labels):
        return null
    deviation = (null - 0.5).square().mean(dim=0).sqrt()
    times = auroc_error(scores, labels) / deviation
    return torch.where(times > 1, (0.5 + times * (null - 0.5)).clamp(0, 1), null)


def _relabelled_on_both(
    labels: Labels, groups: Sequence[str], held_out: Labels, seed: int
) -> Bool[Tensor, "n_labellings n_examples"]:
    """The random labellings that leave both sides among the training and among the held-out examples."""
    drawn = relabelled(labels, groups, RELABELLINGS, seed=seed)
    return drawn[[_has_both(~held_out, each) and _has_both(held_out, each) for each in drawn]]


def _inner_folds(groups: Sequence[str], labels: Labels, left_out: Labels, seed: int) -> Training:
    kept = (~left_out).nonzero().flatten().tolist()
    found = folds([groups[n] for n in kept], labels[kept], INNER_FOLDS, seed=seed + 1)
    whole = torch.zeros(len(found), len(labels), dtype=torch.bool)
    whole[:, kept] = found
    return whole


def _has_both(rows: Labels, labels: Labels) -> bool:
    return bool((rows & labels).any() and (rows & ~labels).any())


def _calibrated(scores: Tensor, training: Training, labels: Labels) -> Float[Tensor, "n_folds n_layers n_examples"]:
    """Scores scaled so that each fold's negative training examples have the mean 0 and its positive ones the mean 1."""
    positive, negative = (
        torch.stack([scores[n][:, row & side].mean(dim=-1) for n, row in enumerate(training)])
        for side in (labels, ~labels)
    )
    distance = positive - negative
    distance = torch.where(distance.abs() > 0, distance, torch.ones_like(distance))
    return (scores - negative.unsqueeze(-1)) / distance.unsqueeze(-1)


def _left_out_scores(scores: Float[Tensor, "n_folds n_layers n_examples"], left_out: Training) -> PerLayerScores:
    """Each example's score in the fold that leaves it out; 0 where none does."""
    found = torch.zeros_like(scores[0])
    for of_fold, rows in zip(scores, left_out, strict=True):
        found[:, rows] = of_fold[:, rows]
    return found


def _effect_size(scores: Float[Tensor, "*layers n_examples"], labels: Labels) -> Float[Tensor, "*layers"]:
    return hedges_g(scores[..., labels], scores[..., ~labels])


def _best(sizes: Mapping[str, PerLayer], grid: Mapping[str, Sequence[int]]) -> tuple[str, int]:
    """The method and layer with the largest effect size; an undefined one counts as the smallest."""
    candidates = [(method, layer) for method, layers in grid.items() for layer in layers]
    return max(candidates, key=lambda each: float(sizes[each[0]][each[1]].nan_to_num(nan=-torch.inf)))
