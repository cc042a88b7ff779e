"""What random directions do on the same activations as a trait's vector: the chance level of its dynamics and rises.

A random direction is a random combination of the responses of the reference prompts (`traits/reference`), less their
mean, and so has the covariance of the activations, as the difference of two groups of unrelated examples would.
Without a reference, directions are isotropic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tlcapture.storage.rounding import PROBABILITY_DIGITS, round_significant
from tlcapture.traits.change_points import ChangePoints, Values
from tlcapture.traits.dynamics import Motion, Strengths
from tlcapture.traits.reference import Reference
from tlcapture.traits.rises import Rises
from tlcapture.traits.vectors import TraitVector
from tlcapture.views.kept_tokens import Positions

N_DIRECTIONS = 200
_PERMUTATIONS = 19  # with which a level of 5 % is still exact
_LAYERS_AT_ONCE = 4  # whose random trajectories fit into a core's cache
_LARGEST = 1e30  # number that is written as float32
_ISOTROPIC = 64  # isotropic directions that are combined, instead of responses

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
            "rises": _short(self.rises),
            "reference_rises": own,
            "standardised_rises": _short(self.standardised),
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
        on_basis = {layer: self._layer(layer).on_basis(activations[layer], held) for layer in rows_of}
        levels: dict[int, ChanceLevel] = {}
        for layer, random in self._strengths(on_basis, held):
            rows, chosen = rows_of[layer], [vectors[row] for row in rows_of[layer]]
            found = self._layer(layer).levels(on_basis[layer], chosen, random, own, rows, held)
            levels |= dict(zip(rows, found, strict=True))
        return _rounded([levels[row] for row in range(len(vectors))])

    def _strengths(self, on_basis: dict[int, OnBasis], held: Positions) -> Iterator[tuple[int, Strengths]]:
        """Those of each layer's random directions, a few layers at once."""
        layers = list(on_basis)
        for start in range(0, len(layers), _LAYERS_AT_ONCE):
            some = layers[start : start + _LAYERS_AT_ONCE]
            by_token = torch.cat([on_basis[each] @ self._layer(each).directions("all")[0].T for each in some], dim=1)
            found = Strengths.of(by_token.numpy(force=True).T, held.n_prompt, held, _PERMUTATIONS)
            for number, layer in enumerate(some):
                yield layer, found.of_rows(slice(number * N_DIRECTIONS, (number + 1) * N_DIRECTIONS))

    def _layer(self, number: int) -> _Layer:
        if number not in self._layers:
            self._layers[number] = _Layer(number, self.reference, self.d_model)
        return self._layers[number]


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

    def on_basis(self, activations: Tensor, held: Positions) -> OnBasis:
        """The products of activations of this layer `[n_held, d_model]` and the basis; NaN at tokens not held."""
        return with_gaps(activations.float() @ self.basis.T, held)

    def levels(
        self,
        on_basis: OnBasis,
        vectors: Sequence[TraitVector],
        random: Strengths,
        own: Motion,
        rows: Sequence[int],
        held: Positions,
    ) -> list[ChanceLevel]:
        """The chance level of each vector, whose statistics are in the given rows of `own`; rises are not rounded.

        `random` are the strengths of this layer's random directions.
        """
        directions = self.directions(*(str(vector.trait) for vector in vectors))
        rises, reference, standardised = self._rises(on_basis, directions, held), None, None
        if rises is not None and self.reference is not None:
            reference = self._reference_rises(self.reference, vectors, directions)
            standardised = (rises - reference[0][:, 1:]) / reference[1][:, 1:]
        commitment = _shares(random.changes, own.changes, rows)
        persistence = _shares(random.rises, own.rises, rows)
        return [
            ChanceLevel(
                "isotropic" if self.reference is None else "reference",
                self.digest,
                int(random.commits.sum()),
                None if rises is None else int(random.persists.sum()),
                commitment[row],
                persistence[row],
                None if rises is None else rises[row],
                None if reference is None else (float(reference[0][row, 0]), float(reference[1][row, 0])),
                None if standardised is None else standardised[row],
            )
            for row in range(len(vectors))
        ]

    def _rises(self, on_basis: OnBasis, directions: Directions, held: Positions) -> Values | None:
        """How far each direction rises `[n_vectors, n_directions]`; `None` where a token that this needs is missing."""
        if not held.has_all(1, held.n_tokens):
            return None
        if not 1 < held.n_prompt < held.n_tokens:
            return np.zeros(directions.shape[:2])
        difference = on_basis[held.n_prompt :].mean(dim=0) - on_basis[1 : held.n_prompt].mean(dim=0)
        return (directions @ difference).double().numpy()

    def _reference_rises(
        self, means: Reference, vectors: Sequence[TraitVector], directions: Directions
    ) -> tuple[Values, Values]:
        """Mean and deviation of rises over the reference prompts `[n_vectors, 1 + 200]`, each vector's own first."""
        names = tuple(f"{vector.trait} {vector.method}" for vector in vectors)
        if names not in self._of_reference:
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


def _shares(random: Values | None, own: ChangePoints | Rises | None, rows: Sequence[int]) -> list[float | None]:
    """The share of random directions that are at least as strong as each of the rows of a trait's own statistics."""
    if random is None or own is None:
        return [None] * len(rows)
    return [float(share) for share in (random[:, None] >= own.strength[list(rows)]).mean(axis=0)]


def _rounded(levels: Sequence[ChanceLevel]) -> list[ChanceLevel]:
    """The same with their rises rounded, all at once."""
    names = [name for name in ("rises", "standardised") if getattr(levels[0], name) is not None]
    values = round_significant([[getattr(each, name) for name in names] for each in levels], PROBABILITY_DIGITS)
    return [replace(each, **dict(zip(names, found, strict=True))) for each, found in zip(levels, values, strict=True)]


def _short(values: Values | None) -> Values | None:
    """Rounded numbers as float32 where they fit, which JSON has with the same digits, in less time."""
    return values if values is None or np.abs(values).max() > _LARGEST else values.astype(np.float32)


def _generator(name: str, layer: int) -> torch.Generator:
    seed = blake2b(f"{name}, layer {layer}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(seed, "big"))
