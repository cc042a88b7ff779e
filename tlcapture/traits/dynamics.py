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

from jaxtyping import Float
from torch import Tensor

from tlcapture.errors import NumericalError
from tlcapture.rounding import PROJECTION_DIGITS, round_significant
from tlcapture.shapes import Trajectory

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
    line = trajectory.double()
    if not line.isfinite().all():
        raise NumericalError("the trajectory holds NaN or inf")
    velocity = line.diff()
    return Dynamics(
        commitment_point=_commitment_point(line[n_prompt_tokens:], n_prompt_tokens),
        peak_velocity=float(velocity[1:].abs().max()) if len(velocity) > 1 else 0.0,
        persistence=_persistence(line[1:]),
        velocity=velocity,
        acceleration=velocity.diff(),
    )


def _commitment_point(response: Trajectory, offset: int) -> int | None:
    """The settling time: where the response enters, for good, a band of a quarter of its range around
    the mean of its last quarter."""
    if len(response) < _SHORTEST_RESPONSE:
        return None
    final = response[-(len(response) // 4) :].mean()
    band = (response.max() - response.min()) / 4
    outside = ((response - final).abs() > band).nonzero()
    if not len(outside):
        return offset
    settled = int(outside[-1, 0]) + 1
    return offset + settled if settled < len(response) else None


def _persistence(line: Trajectory) -> int:
    if not len(line):
        return 0
    size = line.abs()
    peak = int(size.argmax())
    below = (size[peak + 1 :] < size[peak] / 2).nonzero()
    return int(below[0, 0]) if len(below) else int(len(size) - peak - 1)
