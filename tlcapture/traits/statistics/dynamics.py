"""How a trait moves along a response: velocity, commitment, persistence, each beside its chance level.

Let `s[t]` be the trajectory: the projection at the vector's own layer over prompt and response tokens
as one sequence. Indices count over the whole sequence. `change_points` and `rises` have the definitions and sources.

The first token of a sequence is an attention sink: its activations, and so its projection, can be a
hundred times those of all other tokens whatever the text (Xiao et al., "Efficient Streaming Language
Models with Attention Sinks", 2023; Sun et al., "Massive Activations in Large Language Models", 2024).
Every statistic leaves it out; velocity and acceleration include all tokens.

Where the scores of some tokens are missing (NaN), a statistic that needs one of them is `None`, and so are the steps of
velocity and acceleration that do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from tlcapture.errors import NumericalError
from tlcapture.shapes import Trajectory
from tlcapture.storage.rounding import PROBABILITY_DIGITS, PROJECTION_DIGITS, round_number, round_significant
from tlcapture.traits.statistics.change_points import SHORTEST, ChangePoints, Values, change_points, change_strengths
from tlcapture.traits.statistics.critical_values import LEVEL
from tlcapture.traits.statistics.rises import PERMUTATIONS, Rises, rise_strengths, rises
from tlcapture.views.kept_tokens import Positions

Trajectories = Float[Tensor, "n_trajectories n_tokens"]


@dataclass(frozen=True, eq=False)
class Dynamics:
    """Velocity, commitment and persistence of a trajectory.

    Attributes:
        velocity: `s[t+1] - s[t]`, one value fewer than tokens, in units of the projection per token; NaN where a token
            is missing.
        acceleration: the difference of the velocity, one value fewer again.
        peak_velocity: the largest `|velocity|` of a step into the response or within it; 0 without such a step.
        commitment_point: index of the response token at which the trajectory changes its level; `None` where series
            without a change have one as clear in more than 5 %, and for fewer than eight response tokens.
        commitment_shift: the mean of the response from its best change point on less the mean before; `None` for
            fewer than eight response tokens.
        commitment_p: how often series without a change have one as clear; `None` as above.
        persistence: how many tokens from the peak of the smoothed response on, itself counted, stay at or above the
            baseline plus half of the peak's rise; `None` where the rise is within chance.

    `peak_velocity`, commitment and persistence are `None`, too, where they need a token that is missing.
    """

    commitment_point: int | None
    commitment_shift: float | None
    commitment_p: float | None
    peak_velocity: float | None
    persistence: int | None
    velocity: Float[Tensor, " n_velocities"] = field(repr=False)
    acceleration: Float[Tensor, " n_accelerations"] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """The key `dynamics` of a projection file, rounded to 6 significant digits."""
        return dynamics_to_json([self])[0]


def dynamics_to_json(several: Sequence[Dynamics]) -> list[dict[str, Any]]:
    """The key `dynamics` of the files of several projections, which are rounded together."""
    steps = iter(_steps([part.numpy() for each in several for part in (each.velocity, each.acceleration)]))
    return [
        {
            "commitment_point": each.commitment_point,
            "commitment_shift": _rounded(each.commitment_shift, PROJECTION_DIGITS),
            "commitment_p": _rounded(each.commitment_p, PROBABILITY_DIGITS),
            "peak_velocity": _rounded(each.peak_velocity, PROJECTION_DIGITS),
            "persistence": each.persistence,
            "velocity": next(steps),
            "acceleration": next(steps),
        }
        for each in several
    ]


def dynamics(trajectory: Trajectory, n_prompt_tokens: int, held: Positions | None = None) -> Dynamics:
    """The dynamics of a trajectory `[n_tokens]` whose first `n_prompt_tokens` belong to the prompt.

    `held` are the tokens that have a score; the others are NaN. Raises `NumericalError` for NaN or inf in their place.
    """
    return Motion.of(trajectory.double().unsqueeze(0), n_prompt_tokens, held).dynamics()[0]


@dataclass(frozen=True, eq=False)
class Motion:
    """The change points and rises of several trajectories `[n_trajectories, n_tokens]` of one capture.

    `changes` are `None` for responses of fewer than eight tokens, `rises` without a response or a baseline, and both
    where they need a token that is missing.
    """

    values: Values
    n_prompt_tokens: int
    changes: ChangePoints | None
    rises: Rises | None

    @classmethod
    def of(
        cls,
        trajectories: Trajectories,
        n_prompt_tokens: int,
        held: Positions | None = None,
        n_permutations: int = PERMUTATIONS,
    ) -> Motion:
        """Find them, in the dtype of the trajectories.

        `held` are the tokens that have scores; `None` means all. Raises `NumericalError` for NaN or inf in their place.
        """
        values = trajectories.numpy(force=True)  # for so few numbers NumPy is faster than torch
        has_change, has_rise = _statistics(values, n_prompt_tokens, held)
        return cls(
            values,
            n_prompt_tokens,
            change_points(values[:, max(1, n_prompt_tokens) :]) if has_change else None,
            rises(values, n_prompt_tokens, n_permutations) if has_rise else None,
        )

    def dynamics(self) -> Sequence[Dynamics]:
        """The dynamics of each trajectory."""
        velocity = np.diff(self.values, axis=1)
        acceleration = np.diff(velocity, axis=1)
        peaks = np.abs(velocity[:, max(1, self.n_prompt_tokens - 1) :]).max(axis=1, initial=0.0)
        found = zip(self.commits.tolist(), self.persists.tolist(), velocity, acceleration, peaks.tolist(), strict=True)
        return [self._dynamics_of(row, *each) for row, each in enumerate(found)]

    @property
    def commits(self) -> Any:
        """Whether each trajectory has a change point that chance does not explain, `[n_trajectories]`."""
        return self._none if self.changes is None else self.changes.p <= LEVEL

    @property
    def persists(self) -> Any:
        """Whether each trajectory rises further than chance does, `[n_trajectories]`."""
        return self._none if self.rises is None else self.rises.is_beyond_chance

    @property
    def _none(self) -> Any:
        return np.zeros(len(self.values), dtype=bool)

    def _dynamics_of(
        self, row: int, commits: bool, persists: bool, velocity: Values, acceleration: Values, peak_velocity: float
    ) -> Dynamics:
        changes, begins = self.changes, max(1, self.n_prompt_tokens)
        return Dynamics(
            commitment_point=begins + int(changes.index[row]) if changes and commits else None,
            commitment_shift=float(changes.shift[row]) if changes else None,
            commitment_p=float(changes.p[row]) if changes else None,
            peak_velocity=None if np.isnan(peak_velocity) else peak_velocity,
            persistence=int(self.rises.persistence[row]) if self.rises and persists else None,
            velocity=torch.from_numpy(velocity),
            acceleration=torch.from_numpy(acceleration),
        )


@dataclass(frozen=True, eq=False)
class Strengths:
    """Whether, and how clearly, each of several trajectories of one capture commits and persists, `[n_trajectories]`.

    `changes` are the strengths of change points, `rises` those of rises; `None` where `Motion` has none.
    """

    commits: NDArray[np.bool_]
    persists: NDArray[np.bool_]
    changes: Values | None
    rises: Values | None

    @classmethod
    def of(cls, values: Values, n_prompt_tokens: int, held: Positions, n_permutations: int) -> Strengths:
        """Find them for trajectories `[n_trajectories, n_tokens]`, faster than `Motion` does.

        A trajectory persists if it rises further than all of `n_permutations`: 19 give a level of 5 %.
        """
        has_change, has_rise = _statistics(values, n_prompt_tokens, held)
        commits = persists = np.zeros(len(values), dtype=bool)
        changes = risen = None
        if has_change:
            commits, changes = change_strengths(values[:, max(1, n_prompt_tokens) :])
        if has_rise:
            persists, risen = rise_strengths(values, n_prompt_tokens, n_permutations)
        return cls(commits, persists, changes, risen)

    @classmethod
    def together(cls, parts: Sequence[Strengths]) -> Strengths:
        """The strengths of several groups of trajectories of the same capture, as one."""

        def joined(name: str) -> Any:
            found = [getattr(each, name) for each in parts]
            return None if found[0] is None else np.concatenate(found)

        return cls(joined("commits"), joined("persists"), joined("changes"), joined("rises"))


def _statistics(values: Values, n_prompt_tokens: int, held: Positions | None) -> tuple[bool, bool]:
    """Whether trajectories have change points, and rises; raises `NumericalError` for NaN or inf at tokens held."""
    n_tokens = values.shape[1]
    held = held or Positions.of(None, n_prompt_tokens, n_tokens)
    if not np.isfinite(values if held.is_all else values[:, list(held.kept)]).all():
        raise NumericalError("the trajectory holds NaN or inf")
    begins = max(1, n_prompt_tokens)
    has_change = n_tokens - begins >= SHORTEST and held.has_all(begins, n_tokens)
    has_rise = n_prompt_tokens >= 2 and n_tokens > n_prompt_tokens and held.has_all(1, n_tokens)
    return has_change, has_rise


def _steps(series: Sequence[Values]) -> list[Any]:
    """Series rounded for JSON, all at once, with null in place of steps from or to a token that is missing."""
    values, ends = np.concatenate(series), list(accumulate((len(each) for each in series), initial=0))
    known = ~np.isnan(values)
    if known.all():
        rounded = round_significant(values, PROJECTION_DIGITS)
        return [rounded[start:end] for start, end in pairwise(ends)]
    found = np.full(values.shape, None, dtype=object)
    found[known] = round_significant(values[known], PROJECTION_DIGITS)
    return [found[start:end].tolist() for start, end in pairwise(ends)]


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round_number(value, digits)
