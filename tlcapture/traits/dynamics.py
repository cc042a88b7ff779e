"""How a trait moves along a response: velocity, commitment, persistence.

Let `s[t]` be the trajectory: the projection at the vector's own layer over prompt and response tokens
as one sequence. Indices count over the whole sequence.

The first token of a sequence is an attention sink: its activations, and so its projection, can be a
hundred times those of all other tokens whatever the text (Xiao et al., "Efficient Streaming Language
Models with Attention Sinks", 2023; Sun et al., "Massive Activations in Large Language Models", 2024).
The peaks below leave it out; velocity and acceleration include all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from tlcapture.errors import NumericalError
from tlcapture.shapes import Trajectory
from tlcapture.storage.rounding import PROJECTION_DIGITS, round_significant

_Values = NDArray[np.float64]

_SHORTEST_RESPONSE = 4


@dataclass(frozen=True)
class Dynamics:
    """Velocity, commitment and persistence of a trajectory.

    Attributes:
        velocity: `s[t+1] - s[t]`, one value fewer than tokens, in units of the projection per token.
        acceleration: the difference of the velocity, one value fewer again.
        peak_velocity: the largest `|velocity|` after the first token; 0 for fewer than three tokens.
        commitment_point: index of the first response token from which the trajectory stays in its final band;
            `None` if it does not settle, and for fewer than four response tokens.
        persistence: how many tokens directly after the peak of `|s|` (the first token left out) stay at or
            above half of it.
    """

    commitment_point: int | None
    peak_velocity: float
    persistence: int
    velocity: Float[Tensor, " n_velocities"]
    acceleration: Float[Tensor, " n_accelerations"]

    def to_json(self) -> dict[str, Any]:
        """The key `dynamics` of a projection file, rounded to 6 significant digits."""
        return {
            "commitment_point": self.commitment_point,
            "peak_velocity": float(round_significant(self.peak_velocity, PROJECTION_DIGITS)),
            "persistence": self.persistence,
            "velocity": round_significant(self.velocity.numpy(), PROJECTION_DIGITS),
            "acceleration": round_significant(self.acceleration.numpy(), PROJECTION_DIGITS),
        }


def dynamics(trajectory: Trajectory, n_prompt_tokens: int) -> Dynamics:
    """The dynamics of a trajectory `[n_tokens]` whose first `n_prompt_tokens` belong to the prompt.

    Raises `NumericalError` for NaN or inf.
    """
    values = trajectory.double().numpy(force=True)  # for so few numbers NumPy is faster than torch
    if not np.isfinite(values).all():
        raise NumericalError("the trajectory holds NaN or inf")
    velocity = np.diff(values)
    return Dynamics(
        commitment_point=_commitment_point(values[n_prompt_tokens:], n_prompt_tokens),
        peak_velocity=float(np.abs(velocity[1:]).max(initial=0.0)),
        persistence=_persistence(values[1:]),
        velocity=torch.from_numpy(velocity),
        acceleration=torch.from_numpy(np.diff(velocity)),
    )


def _commitment_point(response: _Values, offset: int) -> int | None:
    """The settling time: where the response enters, and does not leave again, a band of a quarter of its range
    around the mean of its last quarter."""
    if len(response) < _SHORTEST_RESPONSE:
        return None
    last = response[-(len(response) // 4) :]
    final = last.mean().clip(last.min(), last.max())  # rounding may move the mean of equal numbers away from them
    band = (response.max() - response.min()) / 4
    outside = np.flatnonzero(np.abs(response - final) > band)
    if not len(outside):
        return offset
    settled = int(outside[-1]) + 1
    return offset + settled if settled < len(response) else None


def _persistence(values: _Values) -> int:
    if not len(values):
        return 0
    size = np.abs(values)
    peak = int(size.argmax())
    below = np.flatnonzero(size[peak + 1 :] < size[peak] / 2)
    return int(below[0]) if len(below) else len(size) - peak - 1
