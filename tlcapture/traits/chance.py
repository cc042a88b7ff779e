"""What random directions do on the same activations as a trait's vector: the chance level of its dynamics and rises.

A random direction is a random combination of the responses of the reference prompts (`traits/reference`), less their
mean, and so has the covariance of the activations, as the difference of two groups of unrelated examples would.
Without a reference, directions are isotropic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tlcapture.storage.rounding import PROBABILITY_DIGITS, round_significant
from tlcapture.traits.change_points import Values
from tlcapture.traits.dynamics import Motion
from tlcapture.traits.reference import Reference
from tlcapture.traits.vectors import TraitVector
from tlcapture.views.kept_tokens import Positions

N_DIRECTIONS = 200
_PERMUTATIONS = 19  # with which a level of 5 % is still exact
_ISOTROPIC = 64  # isotropic directions that are combined, instead of responses
_MOST_NUMBERS = 2**18  # of trajectories whose motion is found at once

Basis = Float[Tensor, "n_basis d_model"]
OnBasis = Float[Tensor, "n_tokens n_basis"]
Directions = Float[Tensor, "n_vectors n_directions n_basis"]


@dataclass(frozen=True)
class ChanceLevel:
    """What 200 random directions do at a vector's layer, on one capture.

    Attributes:
        covariance: `reference`, or `isotropic` without a reference.
        directions: a digest; rises of two captures are of the same directions if it is equal.
        commit, persist: how many commit, and how many persist.
        commitment, persistence: the share whose change point or peak is at least as clear as the vector's; `None`
            where there are no such statistics.
        rises: how far each rises, the mean over the response less that over the prompt.
        persist, persistence, rises, standardised: `None` where they need a token that the capture does not hold.
        reference_rises: the mean and deviation of the vector's rise over the reference prompts; `None` without any.
        standardised: the rises of the random directions, each in deviations of its own over the reference prompts.

    Rises are rounded to 4 significant digits.
    """

    covariance: str
    directions: str
    commit: int
    persist: int | None
    commitment: float | None
    persistence: float | None
    rises: Values | None
    reference_rises: tuple[float, float] | None
    standardised: Values | None

    def to_json(self) -> dict[str, Any]:
        """The key `chance` of a projection file's metadata."""
        own = None if self.reference_rises is None else dict(zip(("mean", "sd"), self.reference_rises, strict=True))
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
    """Random directions of one component of one model; those of a layer and a trait are always the same."""

    reference: Reference | None
    n_layers: int
    d_model: int
    _layers: dict[int, _Layer] = field(default_factory=dict)

    def levels(
        self, activations: dict[int, Tensor], vectors: Sequence[TraitVector], held: Positions, own: Motion
    ) -> Sequence[ChanceLevel | None]:
        """The chance level of each vector, whose `own` change points and rises are those of the same row.

        `activations` `[n_held, d_model]` of the capture are those of each vector's layer, at the tokens that are held.
        Without every token of the response there is no chance level.
        """
        if not held.has_all(max(1, held.n_prompt), held.n_tokens):
            return [None] * len(vectors)
        rows_of: dict[int, list[int]] = {}
        for row, vector in enumerate(vectors):
            rows_of.setdefault(vector.layer, []).append(row)
        on_basis = {
            layer: with_gaps(activations[layer].float() @ self._layer(layer).basis.T, held) for layer in rows_of
        }
        levels: dict[int, ChanceLevel] = {}
        for layer, motion in self._motions(on_basis, held):
            rows = rows_of[layer]
            own_vectors = [vectors[row] for row in rows]
            found = self._layer(layer).levels(on_basis[layer], own_vectors, motion, own, rows, held)
            levels |= dict(zip(rows, found, strict=True))
        return [levels[row] for row in range(len(vectors))]

    def _layer(self, number: int) -> _Layer:
        if number not in self._layers:
            self._layers[number] = _Layer(number, self.reference, self.d_model)
        return self._layers[number]

    def _motions(self, on_basis: dict[int, OnBasis], held: Positions) -> Iterator[tuple[int, Motion]]:
        """The motion of each layer's random directions, those of several layers found at once."""
        n_tokens = len(next(iter(on_basis.values())))
        n_at_once = max(1, _MOST_NUMBERS // (N_DIRECTIONS * n_tokens))
        layers = list(on_basis)
        for start in range(0, len(layers), n_at_once):
            some = layers[start : start + n_at_once]
            trajectories = torch.cat([self._layer(layer).directions("all")[0] @ on_basis[layer].T for layer in some])
            motion = Motion.of(trajectories, held.n_prompt, held, n_permutations=_PERMUTATIONS)
            for number, layer in enumerate(some):
                yield layer, motion.of_rows(slice(number * N_DIRECTIONS, (number + 1) * N_DIRECTIONS))


@dataclass(frozen=True, eq=False)
class _Layer:
    number: int
    reference: Reference | None
    d_model: int
    _directions: dict[tuple[str, ...], Directions] = field(default_factory=dict)
    _of_reference: dict[tuple[str, ...], tuple[Values, Values]] = field(default_factory=dict)

    @cached_property
    def basis(self) -> Basis:
        """What directions are combined from."""
        if self.reference is None:
            return torch.randn(_ISOTROPIC, self.d_model, generator=_generator("basis", self.number))
        responses = self.reference.response_means[self.number].float()
        return responses - responses.mean(dim=0)

    @cached_property
    def digest(self) -> str:
        source = repr(self.basis.double().sum(dim=1).tolist()).encode()
        return blake2b(source, digest_size=8).hexdigest()

    def directions(self, *names: str) -> Directions:
        """Directions of length 1 as combinations of the basis, 200 for each name."""
        if names not in self._directions:
            each = []
            for name in names:
                drawn = torch.randn(N_DIRECTIONS, len(self.basis), generator=_generator(name, self.number))
                lengths = (drawn @ self.basis).norm(dim=1, keepdim=True)
                each.append(drawn / lengths.clamp(min=torch.finfo(lengths.dtype).tiny))
            self._directions[names] = torch.stack(each)
        return self._directions[names]

    def levels(
        self,
        on_basis: OnBasis,
        vectors: Sequence[TraitVector],
        motion: Motion,
        own: Motion,
        rows: Sequence[int],
        held: Positions,
    ) -> list[ChanceLevel]:
        """The chance level of each vector, whose statistics are in the given rows of `own`.

        `motion` is that of the layer's random directions; `on_basis` are the products of activations and basis.
        """
        n_prompt_tokens, has_rises = held.n_prompt, held.has_all(1, held.n_tokens)
        directions = self.directions(*(str(vector.trait) for vector in vectors))
        rises = np.zeros(directions.shape[:2])
        if 1 < n_prompt_tokens < len(on_basis):
            difference = on_basis[n_prompt_tokens:].mean(dim=0) - on_basis[1:n_prompt_tokens].mean(dim=0)
            rises = (directions @ difference).double().numpy()
        found = self._reference_rises(vectors, directions) if has_rises else None
        standardised = None if found is None else _rounded((rises - found[0][:, 1:]) / found[1][:, 1:])
        commitment, persistence = (
            _shares(random, measured, rows)
            for random, measured in ((motion.changes, own.changes), (motion.rises, own.rises))
        )
        rounded = _rounded(rises) if has_rises else None
        return [
            ChanceLevel(
                "isotropic" if self.reference is None else "reference",
                self.digest,
                int(motion.commits.sum()),
                int(motion.persists.sum()) if has_rises else None,
                commitment[number],
                persistence[number],
                None if rounded is None else rounded[number],
                None if found is None else (float(found[0][number, 0]), float(found[1][number, 0])),
                None if standardised is None else standardised[number],
            )
            for number in range(len(vectors))
        ]

    def _reference_rises(self, vectors: Sequence[TraitVector], directions: Directions) -> tuple[Values, Values] | None:
        """Mean and deviation of rises over the reference prompts `[n_vectors, 1 + 200]`, each vector's own first."""
        if self.reference is None:
            return None
        names = tuple(f"{vector.trait} {vector.method}" for vector in vectors)
        if names not in self._of_reference:
            means = self.reference
            moved = (means.response_means[self.number] - means.prompt_means[self.number]).double()
            units = torch.nn.functional.normalize(torch.stack([each.vector for each in vectors]).double(), dim=1)
            random = torch.einsum("pd,bd,vrb->pvr", moved, self.basis.double(), directions.double())
            found = torch.cat([(moved @ units.T).unsqueeze(2), random], dim=2)
            self._of_reference[names] = found.mean(dim=0).numpy(), found.std(dim=0).clamp(min=1e-30).numpy()
        return self._of_reference[names]


def with_gaps(rows: Tensor, held: Positions) -> Tensor:
    """`[n_tokens, ...]` from `[n_held, ...]`, NaN at the tokens that are not held."""
    if held.is_all:
        return rows
    whole = rows.new_full((held.n_tokens, *rows.shape[1:]), torch.nan)
    whole[list(held.kept)] = rows
    return whole


def _shares(random: Any, own: Any, rows: Sequence[int]) -> list[float | None]:
    """The share of random directions whose statistic is at least as large as that of each row."""
    if random is None or own is None:
        return [None] * len(rows)
    shares = (random.strength[:, None] >= own.strength[list(rows)]).mean(axis=0)
    return [float(share) for share in shares]


def _rounded(values: Values) -> Values:
    return round_significant(values, PROBABILITY_DIGITS)


def _generator(name: str, layer: int) -> torch.Generator:
    seed = blake2b(f"{name}, layer {layer}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(seed, "big"))
