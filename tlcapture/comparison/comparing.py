"""The comparison of two captures, as an object and as the content of its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tlcapture.captures.capture import Capture
from tlcapture.comparison.differences import Unembed, cosine, divergence, norm_ratio, projected
from tlcapture.comparison.shared_tokens import SharedTokens, shared_tokens
from tlcapture.errors import InputError
from tlcapture.storage.rounding import PROBABILITY_DIGITS, PROJECTION_DIGITS, round_significant, rounded_or_none
from tlcapture.traits.statistics.chance import RandomDirections
from tlcapture.traits.vectors import TraitVector
from tlcapture.views.kept_tokens import spread_rows

KL = "D(a || b): the expectation under a of log p_a - log p_b, in nats"

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class VectorPair:
    """The vectors that `a` and `b` are projected onto, for one trait: the same one, or each model's own."""

    a: TraitVector
    b: TraitVector


@dataclass(frozen=True, eq=False)
class Unembeddings:
    """The final norm and unembedding of the models of `a` and `b`, and the size of their vocabulary."""

    a: Unembed
    b: Unembed
    d_vocab: int


@dataclass(frozen=True, eq=False)
class RandomChanges:
    """The changes of the mean projection over the response for random directions, `[n_directions]`.

    `directions` is their digest.
    """

    directions: str
    changes: Values

    def to_json(self) -> dict[str, Any]:
        """The key `random` of a trait in a comparison file, rounded to 4 significant digits."""
        return {"directions": self.directions, "changes": round_significant(self.changes, PROBABILITY_DIGITS).tolist()}


@dataclass(frozen=True, eq=False)
class TraitChange:
    """The difference of projections `[n_held]`, and the mean over the whole response of each side, if it is held.

    `random` are the changes of random directions at the same layer; `None` where there were none, or the
    response is not held.
    """

    vectors: VectorPair
    difference: Values
    mean_a: float | None
    mean_b: float | None
    random: RandomChanges | None = None


@dataclass(frozen=True, eq=False)
class Comparison:
    """How `b` differs from `a` at the tokens that both begin with and hold activations of.

    Attributes:
        cosine, norm_ratio: of `residual_out`, `[n_held, n_layers]`; NaN at layers that one of them does not hold.
        kl: `D(a || b)` of the next-token distributions in nats, `[n_held]`, if the unembeddings were given.
    """

    a: Capture
    b: Capture
    shared: SharedTokens
    traits: Sequence[TraitChange]
    cosine: Values
    norm_ratio: Values
    kl: Values | None

    def to_json(self, name_a: str, name_b: str, metadata: dict[str, Any]) -> dict[str, Any]:
        """The content of a comparison file; tokens without activations are null."""
        n_tokens = self.shared.held.n_tokens
        content = {
            "a": name_a,
            "b": name_b,
            "tokens": self.a.tokens[:n_tokens],
            "n_prompt_tokens": self.shared.held.n_prompt,
            "traits": {str(each.vectors.a.trait): self._trait(each) for each in self.traits},
            "residual": {
                "cosine": self._spread([_listed(row) for row in self.cosine]),
                "norm_ratio": self._spread([_listed(row) for row in self.norm_ratio]),
            },
        }
        if self.kl is not None:
            content["kl"] = self._spread(_listed(self.kl))
        rest = {"a": self.a.tokens[n_tokens:], "b": self.b.tokens[n_tokens:]}
        if any(rest.values()):
            content["continuations"] = rest
        own = {"prompt_set": self.a.prompt_set, "prompt_id": self.a.prompt_id, "n_layers": self.a.n_layers}
        same = blake2b(repr([*self.a.prompt.token_ids]).encode(), digest_size=8).hexdigest()
        kl = {} if self.kl is None else {"kl": KL}
        return {**content, "metadata": {**own, "prompt_digest": same, **kl, **metadata}}

    def _trait(self, change: TraitChange) -> dict[str, Any]:
        a, b = change.vectors.a, change.vectors.b
        other = {} if b is a else {"b": {"experiment": b.experiment, "method": b.method, "layer": b.layer}}
        return {
            "layer": a.layer,
            "method": a.method,
            "experiment": a.experiment,
            "difference": self._spread(_listed(change.difference)),
            "mean_a": rounded_or_none(change.mean_a),
            "mean_b": rounded_or_none(change.mean_b),
            **({} if change.random is None else {"random": change.random.to_json()}),
            **other,
        }

    def _spread(self, rows: Sequence[Any]) -> list[Any]:
        return spread_rows(rows, self.shared.held, None)


def compare_captures(
    a: Capture,
    b: Capture,
    vectors: Sequence[VectorPair] = (),
    unembeddings: Unembeddings | None = None,
    random: Sequence[RandomDirections | None] = (),
) -> Comparison:
    """Compare two captures at the tokens that both begin with.

    `random` are the random directions to compare the vectors of `a` and of `b` with, if there are any.

    Raises:
        InputError: they share no token, are of models of other sizes or tokenizers, or lack what is asked for.
        NumericalError: a divergence is not finite.
    """
    shared = shared_tokens(a, b)
    cosines, ratios = _residuals(a, b, shared)
    return Comparison(
        a,
        b,
        shared,
        [_trait_change(a, b, shared, pair, random) for pair in vectors],
        cosines,
        ratios,
        None if unembeddings is None else _divergence(a, b, shared, unembeddings),
    )


def _residuals(a: Capture, b: Capture, shared: SharedTokens) -> tuple[Values, Values]:
    cosines = np.full((len(shared.held.kept), a.n_layers), np.nan)
    ratios = cosines.copy()
    if all("residual_out" in each.kept.points for each in (a, b)):
        for layer in sorted({*a.kept.layers} & {*b.kept.layers}):
            one, other = a.residual(layer)[shared.rows_a], b.residual(layer)[shared.rows_b]
            cosines[:, layer], ratios[:, layer] = cosine(one, other).numpy(), norm_ratio(one, other).numpy()
    return cosines, ratios


def _trait_change(
    a: Capture,
    b: Capture,
    shared: SharedTokens,
    pair: VectorPair,
    random: Sequence[RandomDirections | None],
) -> TraitChange:
    sides = ((a, pair.a), (b, pair.b))
    scores_a, scores_b = (projected(each.residual(vector.layer), vector.vector) for each, vector in sides)
    difference = (scores_b[shared.rows_b] - scores_a[shared.rows_a]).numpy()
    of_responses = (_response_mean(each, scores) for each, scores in ((a, scores_a), (b, scores_b)))
    mean_a, mean_b = (None if mean is None else float(mean) for mean in of_responses)
    changes = _random_changes(sides, [each for each in random if each is not None])
    return TraitChange(pair, difference, mean_a, mean_b, changes)


def _random_changes(
    sides: Sequence[tuple[Capture, TraitVector]], random: Sequence[RandomDirections]
) -> RandomChanges | None:
    """The changes of a trait's random directions; `None` without any, and where a response is not held."""
    if not random:
        return None
    means, digests = [], []
    for (capture, vector), directions in zip(sides, random, strict=True):
        mean = _response_mean(capture, capture.residual(vector.layer).double())
        if mean is None:
            return None
        means.append(directions.projections(str(vector.trait), vector.layer, mean))
        digests.append(directions.digest(vector.layer))
    return RandomChanges("-".join(dict.fromkeys(digests)), (means[1] - means[0]).numpy())


def _response_mean(capture: Capture, rows: Tensor) -> Tensor | None:
    """The mean of rows of tokens `[n_held, ...]` over the response, or without one over the prompt except its first.

    `None` where some of these tokens are not held.
    """
    n_prompt, n_tokens = len(capture.prompt.tokens), len(capture.tokens)
    first = n_prompt if n_tokens > n_prompt else 1
    held = capture.positions
    if first >= n_tokens or not held.has_all(first, n_tokens):
        return None
    return rows[[row for row, index in enumerate(held.kept) if index >= first]].mean(dim=0)


class NoDistributionsError(InputError):
    """Captures whose next-token distributions cannot be computed, or not be compared."""


def check_has_outputs(*captures: Capture) -> None:
    """Raise `NoDistributionsError` for a capture without the residual that next-token distributions come from."""
    for each in captures:
        last = each.n_layers - 1
        if last not in each.kept.layers or "residual_out" not in each.kept.points:
            raise NoDistributionsError(f"they need residual_out of layer {last}, but {each.kept.described()}")


def _divergence(a: Capture, b: Capture, shared: SharedTokens, unembeddings: Unembeddings) -> Values:
    check_has_outputs(a, b)
    last = a.n_layers - 1
    one, other = a.residual(last)[shared.rows_a], b.residual(last)[shared.rows_b]
    return divergence(one, other, unembeddings.a, unembeddings.b, unembeddings.d_vocab).numpy()


def _listed(values: Values) -> list[float | None]:
    """Rounded numbers, `None` in place of NaN."""
    known = ~np.isnan(values)
    rounded = round_significant(np.where(known, values, 0.0), PROJECTION_DIGITS).tolist()
    return [number if is_known else None for number, is_known in zip(rounded, known, strict=True)]
