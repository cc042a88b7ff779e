"""What random directions do on the same activations as a trait's vector: the chance level of its dynamics and rises.

A random direction is a random combination of the responses of the reference prompts (`traits/reference`), less their mean, and
so has the covariance of the activations, as the difference of two groups of unrelated examples would. Without a reference,
directions are isotropic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tlcapture.storage.rounding import PROBABILITY_DIGITS, round_significant
from tlcapture.traits.change_points import LEVEL, Values
from tlcapture.traits.dynamics import Motion
from tlcapture.traits.reference import Reference
from tlcapture.traits.vectors import TraitVector

N_DIRECTIONS = 200
_PERMUTATIONS = 39
_ISOTROPIC = 64  # isotropic directions that are combined, instead of responses

Basis = Float[Tensor, "n_basis d_model"]


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
        reference_rises: the mean and deviation of the vector's rise over the reference prompts; `None` without any.
        standardised: the rises of the random directions, each in deviations of its own over the reference prompts.
    """

    covariance: str
    directions: str
    commit: int
    persist: int
    commitment: float | None
    persistence: float | None
    rises: Values
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
            "rises": round_significant(self.rises, PROBABILITY_DIGITS),
            "reference_rises": own,
            "standardised_rises": None
            if self.standardised is None
            else round_significant(self.standardised, PROBABILITY_DIGITS),
        }


@dataclass(frozen=True, eq=False)
class RandomDirections:
    """Random directions of one component of one model; those of a layer and a trait are always the same."""

    reference: Reference | None
    n_layers: int
    d_model: int
    _layers: dict[int, _Layer] = field(default_factory=dict)

    def levels(
        self, activations: dict[int, Tensor], vectors: Sequence[TraitVector], n_prompt_tokens: int, own: Motion
    ) -> list[ChanceLevel]:
        """The chance level of each vector, whose `own` change points and rises are those of the same row.

        `activations` `[n_tokens, d_model]` of the capture are those of each vector's layer.
        """
        moving: dict[int, tuple[Tensor, Motion]] = {}
        levels = []
        for row, vector in enumerate(vectors):
            layer = self._at(vector.layer)
            if vector.layer not in moving:
                on_basis = activations[vector.layer].float() @ layer.basis.T
                trajectories = layer.weights("all") @ on_basis.T
                motion = Motion.of(trajectories, n_prompt_tokens, n_permutations=_PERMUTATIONS)
                moving[vector.layer] = on_basis, motion
            levels.append(layer.level(vector, *moving[vector.layer], n_prompt_tokens, own, row))
        return levels

    def _at(self, layer: int) -> _Layer:
        if layer not in self._layers:
            self._layers[layer] = _Layer(layer, self.reference, self.d_model)
        return self._layers[layer]


@dataclass(frozen=True, eq=False)
class _Layer:
    number: int
    reference: Reference | None
    d_model: int
    _weights: dict[str, Tensor] = field(default_factory=dict)

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

    def weights(self, name: str) -> Float[Tensor, "n_directions n_basis"]:
        """Directions of length 1, as combinations of the basis."""
        if name not in self._weights:
            drawn = torch.randn(N_DIRECTIONS, len(self.basis), generator=_generator(name, self.number))
            lengths = (drawn @ self.basis).norm(dim=1, keepdim=True)
            self._weights[name] = drawn / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)
        return self._weights[name]

    def level(
        self, vector: TraitVector, on_basis: Tensor, motion: Motion, n_prompt_tokens: int, own: Motion, row: int
    ) -> ChanceLevel:
        weights = self.weights(str(vector.trait))
        difference = on_basis[n_prompt_tokens:].mean(dim=0) - on_basis[1:n_prompt_tokens].mean(dim=0)
        has_both = 1 < n_prompt_tokens < len(on_basis)
        rises = (weights @ difference).double().numpy() if has_both else np.zeros(N_DIRECTIONS)
        own_reference, deviations = self._reference_rises(vector, weights)
        return ChanceLevel(
            "isotropic" if self.reference is None else "reference",
            self.digest,
            int(motion.commits.sum()),
            int(motion.persists.sum()),
            _share(motion.changes, own.changes, row),
            _share(motion.rises, own.rises, row),
            rises,
            own_reference,
            None if deviations is None else (rises - deviations[0]) / deviations[1],
        )

    def _reference_rises(
        self, vector: TraitVector, weights: Tensor
    ) -> tuple[tuple[float, float] | None, tuple[Values, Values] | None]:
        """Mean and deviation of rises over the reference prompts, of the vector and of random directions."""
        if self.reference is None:
            return None, None
        key = f"rises of {vector.trait}"
        if key not in self._weights:
            means = self.reference
            moved = (means.response_means[self.number] - means.prompt_means[self.number]).double()
            unit = vector.vector.double() / vector.vector.double().norm()
            of_random = moved @ self.basis.double().T @ weights.double().T
            found = torch.cat([(moved @ unit).unsqueeze(1), of_random], dim=1)
            self._weights[key] = torch.stack([found.mean(dim=0), found.std(dim=0).clamp(min=1e-30)])
        mean, sd = self._weights[key].numpy()
        return (float(mean[0]), float(sd[0])), (mean[1:], sd[1:])


def beats_chance(share: float | None) -> bool:
    """Whether a statistic is larger than that of 95 % of random directions, given the share that reaches it."""
    return share is not None and share <= LEVEL


def _share(random: Any, own: Any, row: int) -> float | None:
    """The share of random directions whose statistic is at least as large as that of a row."""
    if random is None or own is None:
        return None
    return float((random.strength >= own.strength[row]).mean())


def _generator(name: str, layer: int) -> torch.Generator:
    seed = blake2b(f"{name}, layer {layer}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(seed, "big"))
