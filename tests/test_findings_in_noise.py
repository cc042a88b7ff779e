"""How often what is shown as a finding is found in noise, also in noise that is skewed, heavy-tailed or correlated.

With `--reliability` there are more kinds of noise, and ten times as many draws; docs/reliability.md shows the shares.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.evidence import Evidence
from tlcapture.commands.against_steering import _correlation, _Points
from tlcapture.comparison.paired import LEVEL, paired_differences
from tlcapture.extraction.baselines import Baseline, verdict
from tlcapture.extraction.cross_validation import (
    OUTER_FOLDS,
    cross_validate,
    farthest_of_given,
    folds,
    largest_of_given,
)
from tlcapture.extraction.evaluation import auroc, effect_size_interval
from tlcapture.extraction.many_fits import Span
from tlcapture.extraction.monitoring import RANDOM_VECTORS, monitoring
from tlcapture.traits.statistics.chance import RandomDirections
from tlcapture.traits.statistics.change_points import change_points
from tlcapture.traits.statistics.critical_values import critical_score, critical_score_within, critical_value
from tlcapture.traits.statistics.rises import rises
from tlcapture.traits.steering_files import SteeringRun, largest_by_chance

Values = NDArray[np.float64]
Shape = tuple[int, ...]
Draw = Callable[[Shape], Values]  # noise whose mean is 0, independent except perhaps along the last axis


def _autoregressive(generator: np.random.Generator, shape: Shape) -> Values:
    values = generator.standard_normal(shape)
    for token in range(1, shape[-1]):
        values[..., token] = 0.5 * values[..., token - 1] + 0.75**0.5 * values[..., token]
    return values


NOISE: dict[str, Callable[[np.random.Generator, Shape], Values]] = {
    "normal": lambda generator, shape: generator.standard_normal(shape),
    "heavy-tailed": lambda generator, shape: generator.standard_t(3, shape),
    "skewed": lambda generator, shape: generator.exponential(size=shape) - 1,
    "tied": lambda generator, shape: generator.integers(-1, 2, shape).astype(float),
    "unequal variance": lambda g, shape: g.standard_normal(shape) * np.exp(0.7 * g.standard_normal(shape[-1])),
    "correlated": _autoregressive,
}


def commitment(draw: Draw, n: int) -> Values:
    return change_points(draw((40 * n, 30))).p <= LEVEL


def persistence(draw: Draw, n: int) -> Values:
    return rises(draw((10 * n, 50)), 20, 99).is_beyond_chance


def rise_over_a_set(draw: Draw, n: int) -> Values:
    """The largest of ten traits in one of eight prompts, beside ten random directions, 200 times."""
    rises = draw((n, 201, 10, 8))
    scores = (rises - rises.mean(-1, keepdims=True)) / (rises.std(-1, keepdims=True) + 1e-9)
    return _largest_rise(scores[..., 0], critical_score_within(10, 8))


def rise_over_the_reference(draw: Draw, n: int) -> Values:
    """The largest of ten traits in one prompt beside 20 others, and beside ten random directions, 200 times."""
    rises = draw((n, 201, 10, 21))
    scores = (rises[..., 0] - rises[..., 1:].mean(-1)) / rises[..., 1:].std(-1, ddof=1)
    return _largest_rise(scores, critical_score(10, 20))


def _largest_rise(scores: Values, by_prompts: float) -> Values:
    """`scores` are `[n, 201, n_traits]`, the first of the 201 those of the traits themselves."""
    largest = scores.max(axis=-1)
    return largest[:, 0] > np.maximum(critical_value(largest[:, 1:].T), by_prompts) + 0.005


def change_of_a_trait(draw: Draw, n: int) -> Values:
    """Any of three traits over eight prompts, of another model on the same tokens."""
    return np.array([any(each.stands_out for each in paired_differences(run.T)) for run in draw((4 * n, 3, 8))])


def effect_size(draw: Draw, n: int) -> Values:
    """Of five held-out pairs, whose examples share a topic."""
    positive, negative = (torch.from_numpy(draw((5 * n, 5))) for _ in range(2))
    topics = torch.from_numpy(draw((5 * n, 5)))
    low, high = effect_size_interval(positive + topics, negative + topics, paired=True).unbind(dim=1)
    return ((low > 0) | (high < 0)).numpy()


def separation(draw: Draw, n: int) -> Values:
    """The best of three given vectors on the five held-out pairs of eight, beside shuffled labels."""
    labels, groups = torch.arange(16) < 8, [str(number % 8) for number in range(16)]
    held_out, found = torch.arange(16) % 8 < 5, []
    for scores in torch.from_numpy(draw((n // 2, 3, 16))):
        null = largest_of_given(scores, labels, groups, held_out)
        found.append(bool(auroc(scores[:, held_out], labels[held_out]).max() > critical_value(null)))
    return np.array(found)


def separation_by_few(draw: Draw, n: int) -> Values:
    """One of three given vectors on eight examples against 32 of a third of their deviation, beside shuffled labels."""
    labels, groups, found = torch.arange(44) < 8, [str(number) for number in range(44)], []
    held_out = torch.arange(44) < 40
    for scores in torch.from_numpy(draw((n, 3, 44))):
        scores[:, ~labels] /= 3
        null = largest_of_given(scores, labels, groups, held_out)
        found.append(bool(auroc(scores[:, held_out], labels[held_out]).max() > critical_value(null)))
    return np.array(found)


def separation_of_another_trait(draw: Draw, n: int) -> Values:
    """Any of three other traits' vectors on eight pairs, in either direction, beside shuffled labels."""
    labels, groups = torch.arange(16) < 8, [str(number % 8) for number in range(16)]
    found = []
    for scores in torch.from_numpy(draw((n // 2, 3, 16))):
        null = farthest_of_given(scores, labels, groups)
        found.append(bool((auroc(scores, labels) - 0.5).abs().max() > critical_value(null)))
    return np.array(found)


def gain_over_layer_0(draw: Draw, n: int) -> Values:
    """The verdict on vectors of layer 1, whose activations separate 13 pairs as well as those of layer 0."""
    labels, groups, found = torch.arange(26) < 13, [str(number % 13) for number in range(26)], []
    for activations in torch.from_numpy(draw((n // 2, 2, 4, 26))).float().mT:
        activations[:, labels, 0] += 2.0
        scores = cross_validate(Span.of(activations), labels, groups, {"mean_diff": [1]})
        outer = folds(groups, labels, OUTER_FOLDS)
        layer_0 = Baseline.of("layer 0", scores.layer_0, labels, outer)
        found.append(verdict(scores.nested, [layer_0], labels, groups, 1 / 201).text.startswith("adds +"))
    return np.array(found)


def monitored(draw: Draw, n: int) -> Values:
    """A random vector that is said to follow the coefficient, in responses to three questions."""
    random, own = RandomDirections(None, 1, 32).vectors(RANDOM_VECTORS + n, 0).split([RANDOM_VECTORS, n])
    responses = torch.from_numpy(draw((n, 3, 32, 4))).permute(0, 3, 1, 2)
    found = [
        monitoring([0.0, 0.1, 0.2, 0.3], each, vector, random).p for each, vector in zip(responses, own, strict=True)
    ]
    return np.array([p is not None and p <= LEVEL for p in found])


def gain_of_steering(draw: Draw, n: int) -> Values:
    """The best of ten layers and three coefficients, beside 20 random vectors at three of these cells."""
    coefficients, found = np.array([0.1, 0.2, 0.3]), []
    for slopes in draw((n, 21, 10)):
        own, *random = (slopes[..., None] * coefficients).reshape(21, -1)
        best = np.argsort(-own, kind="stable")[:3]
        runs = [
            SteeringRun(
                cell // 3, "probe", "residual", coefficients[cell % 3], 50.0, 90.0, own[cell],
                null=tuple(each[cell] for each in random) if cell in best else None,
            )
            for cell in range(own.size)
        ]  # fmt: skip
        found.append(own.max() > (largest_by_chance(runs) or np.inf))
    return np.array(found)


def correlation_with_steering(draw: Draw, n: int) -> Values:
    """Of effect sizes with gains along twelve layers."""
    series = draw((n, 2, 12)).tolist()
    points = [_Points("a", ["probe"] * 12, [*range(12)], sizes, gains) for sizes, gains in series]
    return np.array([(_correlation("a", [each]).p or 1.0) <= LEVEL for each in points])


# By name: the finding, what it is compared with, the largest share, and whether its noise is along tokens or layers;
# otherwise it is over prompts or examples, which are independent.
FINDINGS = {
    "a response commits": (commitment, "series without a change, as correlated", 0.08, True),
    "a rise persists": (persistence, "blocks of tokens permuted", 0.09, True),
    "a trait of ten rises in a prompt of a set": (rise_over_a_set, "random directions, others", 0.06, False),
    "a trait of ten rises in a single prompt": (rise_over_the_reference, "random directions, others", 0.06, False),
    "a trait of three changes between models": (change_of_a_trait, "sign flips, t without skewness", 0.12, False),
    "the interval of an effect size leaves out 0": (effect_size, "noncentral t of pairs", 0.08, False),
    "the best of three vectors separates": (separation, "labels exchanged within pairs", 0.06, False),
    "the best of three separates 8 from 32": (separation_by_few, "shuffled labels, spread", 0.08, False),
    "a vector separates another trait": (separation_of_another_trait, "labels exchanged within pairs", 0.06, False),
    "a verdict says that a vector adds": (gain_over_layer_0, "a bootstrap over pairs, widened", 0.06, False),
    "a projection follows steering": (monitored, "random vectors", 0.06, True),
    "a gain of steering selects a vector": (gain_of_steering, "random vectors", 0.12, True),
    "effect size correlates with steering": (correlation_with_steering, "the effective number of layers", 0.08, True),
}  # fmt: skip


@pytest.mark.parametrize("name", FINDINGS)
def test_noise_is_seldom_a_finding(name: str, evidence: Evidence, request: pytest.FixtureRequest) -> None:
    find, null, at_most, is_along = FINDINGS[name]
    is_thorough = bool(request.config.getoption("--reliability"))
    for kind, noise in NOISE.items():
        if (kind == "correlated" and not is_along) or not (is_thorough or kind in ("skewed", "correlated")):
            continue
        draw = partial(noise, np.random.default_rng([len(name), len(kind)]))
        found = find(draw, 200 if is_thorough else 20)
        print(f"{name}, {kind}: {found.mean():.1%} of {len(found)}")
        assert found.mean() <= at_most + 3.3 * np.sqrt(at_most * (1 - at_most) / len(found))
        evidence.found_in_noise(name, null, kind, float(found.mean()))
