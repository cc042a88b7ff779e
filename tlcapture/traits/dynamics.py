"""How a trait moves along a response: velocity, commitment, persistence.

Let `s[t]` be the trajectory: the projection at the vector's own layer over prompt and response tokens
in one line. Indices count over the whole line.

The first token of a line is an attention sink: its activations, and so its projection, can be a
hundred times those of all others whatever the text says (Xiao et al., "Efficient Streaming Language
Models with Attention Sinks", 2023; Sun et al., "Massive Activations in Large Language Models", 2024).
The peaks below leave it out; the velocity and acceleration have all tokens.
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

Line = NDArray[np.float64]

_SHORTEST_RESPONSE = 4


@dataclass(frozen=True)
class Dynamics:
    """What a trajectory does.

    Attributes:
        velocity: `s[t+1] - s[t]`, one fewer than tokens, in units of the projection a token.
        acceleration: the difference of the velocity.
        peak_velocity: the largest `|velocity|` behind the first token; 0 for fewer than three tokens.
        commitment_point: the first response token from which the trajectory stays in its final band,
            `None` for fewer than four response tokens.
        persistence: how many tokens after the peak of `|s|` (the first token left out) stay, without a
            break, at or above half of it.
    """

    commitment_point: int | None
    peak_velocity: float
    persistence: int
    velocity: Float[Tensor, " n_velocities"]
    acceleration: Float[Tensor, " n_accelerations"]

    def to_json(self) -> dict[str, Any]:
        return {
            "commitment_point": self.commitment_point,
            "peak_velocity": float(round_significant(self.peak_velocity, PROJECTION_DIGITS)),
            "persistence": self.persistence,
            "velocity": round_significant(self.velocity.numpy(), PROJECTION_DIGITS),
            "acceleration": round_significant(self.acceleration.numpy(), PROJECTION_DIGITS),
        }


def dynamics(trajectory: Trajectory, n_prompt_tokens: int) -> Dynamics:
    """The dynamics of a trajectory whose first `n_prompt_tokens` belong to the prompt."""
    line = trajectory.double().numpy(force=True)  # which makes less ado than torch of so few numbers
    if not np.isfinite(line).all():
        raise NumericalError("the trajectory holds NaN or inf")
    velocity = np.diff(line)
    return Dynamics(
        commitment_point=_commitment_point(line[n_prompt_tokens:], n_prompt_tokens),
        peak_velocity=float(np.abs(velocity[1:]).max(initial=0.0)),
        persistence=_persistence(line[1:]),
        velocity=torch.from_numpy(velocity),
        acceleration=torch.from_numpy(np.diff(velocity)),
    )


def _commitment_point(response: Line, offset: int) -> int | None:
    """The settling time: where the response enters, for good, a band of a quarter of its range around
    the mean of its last quarter."""
    if len(response) < _SHORTEST_RESPONSE:
        return None
    last = response[-(len(response) // 4) :]
    final = last.mean().clip(last.min(), last.max())  # the mean of equal numbers may be rounded away from them
    band = (response.max() - response.min()) / 4
    outside = np.flatnonzero(np.abs(response - final) > band)
    if not len(outside):
        return offset
    settled = int(outside[-1]) + 1
    return offset + settled if settled < len(response) else None


def _persistence(line: Line) -> int:
    if not len(line):
        return 0
    size = np.abs(line)
    peak = int(size.argmax())
    below = np.flatnonzero(size[peak + 1 :] < size[peak] / 2)
    return int(below[0]) if len(below) else len(size) - peak - 1
