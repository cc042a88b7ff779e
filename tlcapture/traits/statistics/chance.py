"""The chance level of a vector's dynamics and rises: those of random directions on the same activations.

A random direction is a random combination of the responses of the reference prompts (in `reference`), less their
mean, and so has the covariance of the activations, as the difference of two groups of unrelated examples would.
Without a reference, directions are isotropic.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tlcapture.products import linear_each
from tlcapture.shapes import Vectors
from tlcapture.storage.rounding import PROBABILITY_DIGITS, round_significant, rounded_for_json
from tlcapture.traits.statistics.change_points import ChangePoints, Values
from tlcapture.traits.statistics.critical_values import critical_score, critical_value, widening
from tlcapture.traits.statistics.dynamics import Motion, Strengths
from tlcapture.traits.statistics.reference import Reference
from tlcapture.traits.statistics.rises import Rises
from tlcapture.traits.vectors import TraitVector
from tlcapture.views.kept_tokens import Positions

N_DIRECTIONS = 200
_PERMUTATIONS = 19  # with which a level of 5 % is still exact
_AT_ONCE = 2**18  # numbers of random trajectories, with which neither calls nor memory take most of the time
_LARGEST = 1e30  # number that is written as float32
_SMALL = 1e-9  # activations below, and those above its inverse, are scaled
_ISOTROPIC = 64  # isotropic directions that are combined, instead of responses

Basis = Float[Tensor, "n_basis d_model"]
OnBasis = Float[Tensor, "n_layers n_tokens n_basis"]
Directions = Float[Tensor, "*n_vectors n_directions n_basis"]


@dataclass(frozen=True, eq=False)
class ChanceLevel:
    """The results of 200 random directions at a vector's layer, on one capture.

    Attributes:
        covariance: `reference`, or `isotropic` without a reference.
        directions: a digest; rises of two captures come from the same directions if it is equal.
        commit, persist: how many commit, and how many persist.
        commitment, persistence: the share of 201 directions, the vector counted with them, whose change point or peak
            is at least as clear as the vector's; `None` where there are no such statistics.
        rises: how far each rises, the mean over the response less that over the prompt.
        persist, persistence, rises, standardised: `None` where they need a token that the capture does not hold.
        reference_rises: the mean and deviation of the vector's rise over the reference prompts; `None` without any.
        n_reference: the number of these prompts.
        widening: by which factor a rise over so few tokens varies more than over theirs.
        standardised: the rises of the random directions, each in deviations of its own over the reference prompts.

    Rises are rounded to 4 significant digits.
    """

    covariance: str
    directions: str
    commit: int
    persist: int | None
    commitment: float | None
    persistence: float | None
    rises: Values | None = field(repr=False)
    reference_rises: tuple[float, float] | None
    standardised: Values | None = field(repr=False)
    n_reference: int = 0
    widening: float = 1.0

    def standard_score(self, rise: float) -> float | None:
        """A rise of the vector less the mean of its rises over the reference prompts, in their standard deviations."""
        return None if self.reference_rises is None else (rise - self.reference_rises[0]) / self.reference_rises[1]

    @property
    def largest_rise(self) -> float | None:
        """The standard score that chance exceeds in at most 5 % of cases.

        It is that of random directions on this capture, or that of this vector on another prompt like those of the
        reference, whichever is larger.
        """
        if self.standardised is None:
            return None
        over_prompts = self.widening * critical_score(1, self.n_reference)
        return max(float(critical_value(self.standardised)), over_prompts)

    def to_json(self) -> dict[str, Any]:
        """The key `chance` of a projection file's metadata."""
        mean, sd = self.reference_rises or (None, None)
        own = None if self.reference_rises is None else {"mean": mean, "sd": sd, "n": self.n_reference}
        return {
            "n_directions": N_DIRECTIONS,
            "covariance": self.covariance,
            "directions": self.directions,
            "commit": self.commit,
            "persist": self.persist,
            "commitment": self.commitment,
            "persistence": self.persistence,
            "rises": self.rises,
            "reference_rises": own,
            "standardised_rises": self.standardised,
        }


@dataclass(frozen=True, eq=False)
class RandomDirections:
    """Random directions for one component of one model; the same layer and trait always get the same ones."""

    reference: Reference | None
    n_layers: int
    d_model: int
    _layers: dict[int, _Layer] = field(default_factory=dict)
    _drawn: dict[Hashable, _Drawn] = field(default_factory=dict)

    @property
    def covariance(self) -> str:
        """`reference`, that of the reference prompts' responses, or `isotropic` without a reference."""
        return "isotropic" if self.reference is None else "reference"

    def levels(
        self, activations: dict[int, Tensor], vectors: Sequence[TraitVector], held: Positions, motion: Motion
    ) -> Sequence[ChanceLevel | None]:
        """The chance level of each vector.

        Without every token of the response there is no chance level.

        Args:
            activations: the capture's at each vector's layer, `[n_held, d_model]`.
            motion: the change points and rises of the vectors' own trajectories, in the same order.
        """
        if not held.has_all(max(1, held.n_prompt), held.n_tokens):
            return [None] * len(vectors)
        drawn = self._drawn_for(vectors)
        on_basis = _on_basis([activations[each] for each in drawn.layers], drawn.bases, held)
        random = drawn.strengths(on_basis, held)
        commit, persist = (each.reshape(-1, N_DIRECTIONS).sum(axis=1) for each in (random.commits, random.persists))
        commitment = _shares(random.changes, motion.changes, drawn.layer_rows)
        persistence = _shares(random.rises, motion.rises, drawn.layer_rows)
        rises = drawn.rises(on_basis, held)
        known = drawn.reference_rises if rises is not None else None
        rounded = None if rises is None else _rounded(rises)
        wider = np.ones(len(vectors)) if known is None else _widenings(motion.values, held, known.own)
        standardised = None if rises is None or known is None else _rounded((rises - known.means) / known.deviations)
        return [
            ChanceLevel(
                covariance=self.covariance,
                directions=self.digest(drawn.layers[layer_row]),
                commit=int(commit[layer_row]),
                persist=None if rises is None else int(persist[layer_row]),
                commitment=commitment[row],
                persistence=persistence[row],
                rises=None if rounded is None else rounded[row],
                reference_rises=None if known is None else known.own[row],
                standardised=None if standardised is None else standardised[row],
                n_reference=0 if self.reference is None else len(self.reference.prompts),
                widening=float(wider[row]),
            )
            for row, layer_row in enumerate(drawn.layer_rows)
        ]

    def projections(
        self, trait: str, layer: int, activation: Float[Tensor, " d_model"]
    ) -> Float[Tensor, " n_directions"]:
        """The projections of an activation onto the directions that a trait's vector at a layer is compared with."""
        drawn = self._layer(layer)
        return drawn.directions(trait).double() @ (drawn.basis.double() @ activation.double())

    def vectors(self, n: int, layer: int) -> Vectors:
        """Random vectors `[n, d_model]` of length 1, the same in every run.

        They are the same combinations of responses at every layer; without a reference the same vectors.
        """
        if self.reference is None:
            drawn = torch.randn(n, self.d_model, generator=torch.Generator().manual_seed(0))
        else:
            basis = self._layer(layer).basis
            drawn = torch.randn(n, len(basis), generator=_generator("vectors", 0)) @ basis
        return torch.nn.functional.normalize(drawn, dim=1)

    def digest(self, layer: int) -> str:
        """A digest of a layer's directions: equal ones have an equal digest."""
        return self._layer(layer).digest

    def _layer(self, number: int) -> _Layer:
        if number not in self._layers:
            self._layers[number] = _Layer(number, self.reference, self.d_model)
        return self._layers[number]

    def _drawn_for(self, vectors: Sequence[TraitVector]) -> _Drawn:
        names = tuple((str(each.trait), each.method, each.layer) for each in vectors)
        if names not in self._drawn:
            numbers = list(dict.fromkeys(each.layer for each in vectors))
            layers = [self._layer(each) for each in numbers]
            self._drawn[names] = _Drawn(
                layers=numbers,
                layer_rows=[numbers.index(each.layer) for each in vectors],
                bases=torch.stack([each.basis for each in layers]),
                of_layers=torch.stack([each.directions("all").T for each in layers]),
                directions=torch.stack([self._layer(each.layer).directions(str(each.trait)) for each in vectors]),
                reference_rises=None if self.reference is None else self._reference_rises(self.reference, vectors),
            )
        return self._drawn[names]

    def _reference_rises(self, reference: Reference, vectors: Sequence[TraitVector]) -> _ReferenceRises:
        found = [self._layer(each.layer).reference_rises(each, reference) for each in vectors]
        means, deviations = (np.stack(each) for each in zip(*found, strict=True))
        own = list(zip(means[:, 0].tolist(), deviations[:, 0].tolist(), strict=True))
        return _ReferenceRises(own, means[:, 1:], deviations[:, 1:])


@dataclass(frozen=True, eq=False)
class _ReferenceRises:
    """Mean and deviation of rises over the reference prompts: of each vector, and of its random directions.

    `means` and `deviations` are `[n_vectors, n_directions]`.
    """

    own: Sequence[tuple[float, float]]
    means: Values
    deviations: Values


@dataclass(frozen=True, eq=False)
class _Drawn:
    """The random directions of several vectors.

    Attributes:
        layers: the layers of the vectors, each once.
        layer_rows: the row of each vector's layer in `layers`.
        bases: `[n_layers, n_basis, d_model]`.
        of_layers: `[n_layers, n_basis, n_directions]`, those whose change points and rises are found.
        directions: `[n_vectors, n_directions, n_basis]`, those whose rises are compared with the vectors'.
        reference_rises: rises over the reference prompts; `None` without any.
    """

    layers: Sequence[int]
    layer_rows: Sequence[int]
    bases: Float[Tensor, "n_layers n_basis d_model"]
    of_layers: Float[Tensor, "n_layers n_basis n_directions"]
    directions: Directions
    reference_rises: _ReferenceRises | None

    def strengths(self, on_basis: OnBasis, held: Positions) -> Strengths:
        """The strengths of all layers' random directions, `[n_layers * n_directions]`, computed for a few at once."""
        found, at_once = [], max(1, _AT_ONCE // (held.n_tokens * N_DIRECTIONS))
        on_basis = _of_usual_size(on_basis)
        for some, directions in zip(on_basis.split(at_once), self.of_layers.split(at_once), strict=True):
            by_token = torch.empty(held.n_tokens, len(some), N_DIRECTIONS)
            torch.bmm(some, directions, out=by_token.transpose(0, 1))
            values = by_token.view(held.n_tokens, -1).numpy().T
            found.append(Strengths.of(values, held.n_prompt, held, _PERMUTATIONS))
        return Strengths.together(found)

    def rises(self, on_basis: OnBasis, held: Positions) -> Values | None:
        """How far each direction rises `[n_vectors, n_directions]`; `None` where a token that this needs is missing."""
        if not held.has_all(1, held.n_tokens):
            return None
        if not 1 < held.n_prompt < held.n_tokens:
            return np.zeros((len(self.layer_rows), N_DIRECTIONS))
        risen = on_basis[:, held.n_prompt :].mean(dim=1) - on_basis[:, 1 : held.n_prompt].mean(dim=1)
        # Not a matrix product: its rounding may differ with the number of vectors.
        found = np.einsum("vdb,vb->vd", self.directions.numpy(), risen[self.layer_rows].numpy(force=True))
        return found.astype(np.float64)


@dataclass(frozen=True, eq=False)
class _Layer:
    number: int
    reference: Reference | None
    d_model: int
    _directions: dict[str, Directions] = field(default_factory=dict)

    @cached_property
    def basis(self) -> Basis:
        """The vectors that directions are combined from."""
        if self.reference is None:
            return torch.randn(_ISOTROPIC, self.d_model, generator=_generator("basis", self.number))
        responses = self.reference.response_means[self.number].float()
        return _of_usual_size(responses - responses.mean(dim=0))

    @cached_property
    def digest(self) -> str:
        source = repr(self.basis.double().sum(dim=1).tolist()).encode()
        return blake2b(source, digest_size=8).hexdigest()

    def directions(self, name: str) -> Directions:
        """200 directions of length 1 as combinations of the basis."""
        if name not in self._directions:
            drawn = torch.randn(N_DIRECTIONS, len(self.basis), generator=_generator(name, self.number))
            lengths = (drawn @ self.basis).norm(dim=1, keepdim=True)
            self._directions[name] = drawn / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)
        return self._directions[name]

    def reference_rises(self, vector: TraitVector, reference: Reference) -> tuple[Values, Values]:
        """Mean and deviation over the reference prompts of the vector's rise, and of its 200 directions' `[1 + 200]`.

        The part of a random direction that is a prompt's own response is left out of its rise there: with it, random
        directions would rise further over the prompts that they are made of than over any other.
        """
        moved = (reference.response_means[self.number] - reference.prompt_means[self.number]).double()
        own = moved @ torch.nn.functional.normalize(vector.vector.double(), dim=0)
        products = moved @ self.basis.double().T  # of each prompt's move and each response
        random = products.fill_diagonal_(0) @ self.directions(str(vector.trait)).double().T
        rises = torch.cat([own.unsqueeze(1), random], dim=1)
        return rises.mean(dim=0).numpy(), rises.std(dim=0).clamp(min=1e-30).numpy()


def _on_basis(activations: Sequence[Tensor], bases: Tensor, held: Positions) -> OnBasis:
    """The products of activations of some layers `[n_held, d_model]` and their bases; NaN at tokens not held."""
    return with_gaps(linear_each(activations, bases), held)


def _of_usual_size(values: Tensor) -> Tensor:
    """Numbers whose squares fit float32: the given ones, or multiples of them, which give the same strengths."""
    largest = float(values.abs().nan_to_num_(nan=0.0).max())
    return values if _SMALL < largest < 1 / _SMALL or largest == 0 else values / largest


def with_gaps(values: Float[Tensor, "n n_held *rest"], held: Positions) -> Float[Tensor, "n n_tokens *rest"]:
    """Values of every token, NaN for those that are not held."""
    if held.is_all:
        return values
    whole = values.new_full((len(values), held.n_tokens, *values.shape[2:]), torch.nan)
    whole[:, list(held.kept)] = values
    return whole


def _shares(
    random: Values | None, own: ChangePoints | Rises | None, layer_rows: Sequence[int]
) -> Sequence[float | None]:
    """The share of directions at each vector's layer, itself counted, that are at least as strong as the vector."""
    if random is None or own is None:
        return [None] * len(layer_rows)
    of_layer = random.reshape(-1, N_DIRECTIONS)[list(layer_rows)]
    n_as_strong = (of_layer >= own.strength[:, None]).sum(axis=1)
    return ((1 + n_as_strong) / (1 + N_DIRECTIONS)).tolist()


def _widenings(trajectories: Values, held: Positions, over_reference: Sequence[tuple[float, float]]) -> Values:
    """The `widening` of each trajectory's rise, given mean and deviation of its rises over the reference prompts."""
    begins, counts = held.n_prompt, (held.n_prompt - 1, held.n_tokens - held.n_prompt)
    if not 1 < begins < held.n_tokens:
        return np.ones(len(trajectories))
    spread = trajectories[:, 1:].std(axis=1)
    rises = trajectories[:, begins:].mean(axis=1) - trajectories[:, 1:begins].mean(axis=1)
    found = zip(over_reference, spread.tolist(), rises.tolist(), strict=True)
    return np.array([widening(sd, deviation, rise, *counts) for (_, sd), deviation, rise in found])


def _rounded(values: Values) -> Values:
    """Rounded numbers, in float32 if they fit: JSON gets the same digits in less time."""
    if np.abs(values).max() > _LARGEST:
        return round_significant(values, PROBABILITY_DIGITS)
    return rounded_for_json(values.astype(np.float32), PROBABILITY_DIGITS)


def _generator(name: str, layer: int) -> torch.Generator:
    seed = blake2b(f"{name}, layer {layer}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(seed, "big"))
