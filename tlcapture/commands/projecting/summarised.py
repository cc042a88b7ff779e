"""The part of a projection that a summary needs: keeping more of hundreds of thousands of files would fill memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isnan, nan
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from tlcapture.names import PromptId
from tlcapture.traits.calibration import Calibration, CalibrationRecord
from tlcapture.traits.projections.files import (
    ChanceRecord,
    DynamicsRecord,
    Means,
    Part,
    ProjectionFile,
    ProjectionMetadata,
    ReferenceRises,
    Scores,
    VectorSource,
)
from tlcapture.traits.statistics.critical_values import LEVEL
from tlcapture.traits.statistics.rises import DEFINITIONS
from tlcapture.traits.verdicts import UsedVector, used_vector

_Values = NDArray[np.float64]
_Kind = TypeVar("_Kind", bound=BaseModel)


@dataclass(frozen=True, eq=False, slots=True)
class Chance:
    """The results of random directions on a capture: `ChanceRecord` with the draws as arrays."""

    n_directions: int
    directions: str
    commit: int
    persist: int | None
    commitment: float | None
    persistence: float | None
    is_isotropic: bool
    rises: _Values | None
    reference_rises: ReferenceRises | None
    standardised_rises: _Values | None

    @classmethod
    def of(cls, record: ChanceRecord) -> Chance:
        """The chance record of a file."""
        return cls(
            record.n_directions,
            _shared(record.directions),
            record.commit,
            record.persist,
            record.commitment,
            record.persistence,
            record.is_isotropic,
            None if record.rises is None else np.array(record.rises),
            record.reference_rises,
            None if record.standardised_rises is None else np.array(record.standardised_rises),
        )


@dataclass(frozen=True, eq=False, slots=True)
class Summarised:
    """The part of a projection that a summary needs.

    Attributes:
        response: its text and its tokens.
        trajectory: of the response, NaN at tokens that are not known.
        prompt_mean, response_mean: of the trajectory, the first token left out; NaN where they are not known.
        deviation: of the trajectory along its tokens, the first left out; 0 where it is not known.
        n_prompt: how many tokens of the prompt these are.
        commitment_point, token: where it commits, and that token; `None` where it does not.
        is_current: whether its dynamics follow the present definitions.
    """

    prompt_id: PromptId | None
    sample: int | None
    vector: UsedVector | None
    calibration: Calibration | None
    response: Part
    trajectory: _Values
    prompt_mean: float
    response_mean: float
    deviation: float
    n_prompt: int
    commitment_point: int | None
    token: str | None
    persists: bool
    is_current: bool
    chance: Chance | None

    @classmethod
    def of(cls, content: ProjectionFile, trait: str, component: str, before: Summarised | None = None) -> Summarised:
        """Take it from the content of a file with dynamics; texts equal to those of `before` are shared with it."""
        metadata, dynamics, tokens = content.metadata, content.dynamics, content.tokens
        prompt, response = (np.array(each) for each in content.trajectory)
        means, known = metadata.means, np.concatenate([prompt[1:], response])
        point = None if dynamics is None else dynamics.commitment_point
        is_shared = before is not None and before.response == content.response
        return cls(
            metadata.prompt_id,
            metadata.sample,
            _shared(used_vector(content, trait, component)),
            _shared(content.calibration),
            before.response if is_shared and before is not None else content.response,
            response,
            _mean(prompt[1:]) if means is None else _number(means.prompt, nan),
            _mean(response) if means is None else _number(means.response, nan),
            float(np.std(known)) if means is None else means.deviation or 0.0,
            max(0, len(content.prompt.tokens) - 1),
            point,
            None if point is None else tokens[point],
            dynamics is not None and dynamics.persistence is not None,
            metadata.definitions == DEFINITIONS,
            None if metadata.chance is None else Chance.of(metadata.chance),
        )

    @property
    def rise(self) -> float:
        """The mean over the response less that over the prompt; NaN where one is not known."""
        return self.response_mean - self.prompt_mean

    def is_clear(self, statistic: str) -> bool:
        """Whether a commitment or a persistence is clearer than in 95 % of random directions; if unknown, it is not."""
        share = None if self.chance is None else getattr(self.chance, statistic)
        return share is not None and share <= LEVEL and self.is_current

    @property
    def commits_clearly(self) -> bool:
        """Whether it commits, more clearly than 95 % of random directions."""
        return self.commitment_point is not None and self.is_clear("commitment")

    @property
    def scaled(self) -> list[float | None]:
        """The trajectory, from -1 as in negative examples to 1 as in positive ones where that is known."""
        on_scale = self.trajectory
        if self.calibration is not None:
            on_scale = 2 * self.calibration.calibrated(self.trajectory) - 1
        return [None if isnan(each) else float(each) for each in on_scale]


def as_written(content: Mapping[str, Any]) -> ProjectionFile:
    """What reading `essentials` gives, of the vector's own layer alone, without checking what was just written."""
    # A default that is made for each object takes pydantic longer than all the rest.
    metadata = {name: value for name, value in content["metadata"].items() if value is not None}
    metadata |= {"interventions": [], "warnings": []}
    layer = metadata["vector_source"]["layer"]
    metadata["vector_source"] = _made(VectorSource, metadata["vector_source"], calibration=CalibrationRecord)
    metadata["chance"] = _made(ChanceRecord, metadata.get("chance"), reference_rises=ReferenceRises)
    metadata["means"] = _made(Means, metadata.get("means"))
    scores = {part: [{layer: at[-1]} for at in rows] for part, rows in content["projections"].items()}
    return ProjectionFile.model_construct(
        prompt=_made(Part, content["prompt"]),
        response=_made(Part, content["response"]),
        projections=_made(Scores, scores),
        metadata=_made(ProjectionMetadata, metadata),
        dynamics=_made(DynamicsRecord, content.get("dynamics"), by_span=None),
        spans=[],
    )


def _made(kind: type[_Kind], value: Mapping[str, Any] | None, **parts: type[BaseModel] | None) -> _Kind | None:
    """An object with these values, unchecked; `parts` are the kinds of some of its fields, or `None` to drop one."""
    if value is None:
        return None
    made = {name: None if part is None else _made(part, value.get(name)) for name, part in parts.items()}
    return kind.model_construct(**{**value, **made})


@lru_cache(1000)
def _shared(value):  # type: ignore[no-untyped-def]
    """One object for all equal ones."""
    return value


def _mean(values: _Values) -> float:
    return float(np.mean(values)) if values.size else nan


def _number(value: float | None, unknown: float) -> float:
    return unknown if value is None else float(value)
