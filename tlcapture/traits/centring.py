"""Subtracting the mean activation of a vector's training examples from what is projected onto it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tlcapture.shapes import Vector
from tlcapture.storage.rounding import PROBABILITY_DIGITS, PROJECTION_DIGITS, round_significant
from tlcapture.traits.massive_dimensions import massive_share
from tlcapture.traits.vectors import TraitVector
from tlcapture.views.kept_tokens import Positions


@dataclass(frozen=True)
class Centred:
    """The offset subtracted from the scores of a projection, and the share of its massive dimensions.

    Attributes:
        offset: the projection of the mean activation of the training examples at the vector's layer.
        massive_dimensions: the dimensions of the capture's activations there that are massive.
        variance_share: the share of the variance of the trajectory that they carry, its first token left out.

    The last two are `None` if the capture does not hold every token.
    """

    offset: float
    massive_dimensions: tuple[int, ...] | None
    variance_share: float | None

    def to_json(self) -> dict[str, Any]:
        """The key `centered` of a projection file's metadata."""
        return {
            "offset": float(round_significant(self.offset, PROJECTION_DIGITS)),
            "massive_dimensions": self.massive_dimensions,
            "massive_variance_share": None
            if self.variance_share is None
            else float(round_significant(self.variance_share, PROBABILITY_DIGITS)),
        }


def subtract_means(
    scores: Sequence[Tensor],
    vectors: Sequence[TraitVector],
    activations: dict[int, Tensor],
    centre: Callable[[TraitVector], Vector],
    held: Positions,
) -> list[Centred | None]:
    """Subtract the projection of each vector's mean activation from its scores."""
    found: list[Centred | None] = []
    for row, (vector, unit) in enumerate(zip(vectors, [each.unit for each in vectors], strict=True)):
        offset = float(centre(vector).double() @ unit.double())
        for part in scores:
            part[row] -= offset
        massive = massive_share(activations[vector.layer], unit) if held.is_all else (None, None)
        found.append(Centred(offset, *massive))
    return found
