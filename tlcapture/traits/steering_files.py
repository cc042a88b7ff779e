"""The content of a trait's steering `results.json`, checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from tlcapture.storage.files import read_json
from tlcapture.storage.validation import Count, FileContent, Layer, Number, Percent, Share, checked
from tlcapture.traits.statistics.critical_values import critical_score, critical_value

Component = Literal["residual", "attn_out"]


class SteeringConfig(FileContent):
    """The vectors added during a run. Runs with several layers are recorded too, but never select a vector."""

    layers: list[Layer] = Field(min_length=1)
    methods: list[str] = Field(min_length=1)
    coefficients: list[Number] = Field(default_factory=list)
    component: Component = "residual"


class SteeringMeans(FileContent):
    """Means over the questions, 0 to 100; `gain` is the change from the baseline, `null` that of random vectors."""

    trait_mean: Percent
    coherence_mean: Percent
    n: Count | None = None
    gain: Number | None = None
    standard_error: Number | None = None
    null: list[Number] | None = Field(default=None, min_length=1)
    null_covariance: str | None = None


class SteeringBaseline(FileContent):
    """Means without steering, 0 to 100."""

    trait_mean: Percent
    coherence_mean: Percent | None = None


class SteeringRecord(FileContent):
    """One run: its settings, its scores, and the digest of the vector."""

    config: SteeringConfig
    result: SteeringMeans
    vector_digest: str | None = None


def largest_by_chance(runs: Iterable[SteeringRun]) -> float | None:
    """The gain that the best of all runs exceeds by chance in at most 5 % of cases; `None` if no run has a null.

    It is what random vectors reach at their best of the runs that have a null: of twenty the largest best gain, which
    one in 21 vectors exceeds. Entry i of every null is the gain of the same random vector.

    Where other runs have none, the vector was the best of more runs than the random ones. The level is then at least
    what the largest of as many gains exceeds in 5 % of cases, if each has the distribution of a null, normal but for
    the skewness of all nulls together (Cornish and Fisher 1938). Runs of one vector whose coefficients have the same
    sign count as one: the gain of a vector seldom changes its sign as the coefficient grows.
    """
    runs = list(runs)
    nulls = [run.null for run in runs if run.null]
    if not nulls:
        return None
    best = float(critical_value([max(gains) for gains in zip_longest(*nulls, fillvalue=float("-inf"))]))
    if len(nulls) == len(runs):
        return best
    n_gains = len({(run.component, run.method, run.layer, run.coefficient > 0) for run in runs})
    several = [null for null in nulls if len(null) > 1]
    skewness = _skewness(several)
    scores = [critical_score(n_gains, len(null)) for null in several]
    skewed = [score + skewness * (score**2 - 1) / 6 for score in scores]
    sizes = zip(several, skewed, strict=True)
    return max([best, *(float(np.mean(null) + score * np.std(null, ddof=1)) for null, score in sizes)])


def _skewness(nulls: Sequence[tuple[float, ...]]) -> float:
    """How far gains are skewed upwards, over all cells; 0 where they are skewed downwards."""
    scores = [(np.array(null) - np.mean(null)) / np.std(null) for null in nulls if np.ptp(null) > 0]
    return max(0.0, float(np.mean(np.concatenate(scores) ** 3))) if scores else 0.0


@dataclass(frozen=True)
class SteeringRun:
    """One single-layer steering run: its settings, its scores, and `delta`, the gain over the baseline.

    `null` are the gains of random vectors of the same norm at the same layer and coefficient, where they were measured;
    `null_covariance` is `reference` where these have the covariance of the reference prompts' responses.
    """

    layer: int
    method: str
    component: str
    coefficient: float
    trait_mean: float
    coherence_mean: float
    delta: float
    vector_digest: str | None = None
    standard_error: float | None = None
    null: tuple[float, ...] | None = None
    null_covariance: str | None = None

    @property
    def null_p95(self) -> float | None:
        """The gain that one more random vector exceeds by chance in at most 5 % of cases; `None` without any."""
        return float(critical_value(self.null)) if self.null else None


class SteeringMonitoring(FileContent):
    """How the projections of responses steered with one vector follow the coefficient, compared with random vectors."""

    layer: Layer
    method: str
    component: Component = "residual"
    coefficients: list[Number]
    projections: list[Number | None] = Field(default_factory=list)
    rank_correlation: Number | None
    null: list[Number] = Field(default_factory=list)
    null_covariance: str | None = None
    p: Share | None = None
    n: Count | None = None
    vector_digest: str | None = None

    @property
    def null_p95(self) -> float | None:
        """The correlation that one more random vector exceeds by chance in at most 5 % of cases."""
        return float(critical_value(self.null)) if self.null else None


class SteeringResults(FileContent):
    """A trait's steering runs and their baseline."""

    baseline: SteeringBaseline
    runs: list[SteeringRecord]
    monitoring: list[SteeringMonitoring] = Field(default_factory=list)
    metadata: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> SteeringResults:
        """Read a trait's results; raises `StorageError` for any other file."""
        return cls.parse(read_json(path), path)

    @classmethod
    def parse(cls, content: Any, path: Path) -> SteeringResults:
        """Check the content of a results file; raises `StorageError` with file, field and reason."""
        return checked(cls, content, path, "steering results")

    @property
    def single_layer_runs(self) -> list[SteeringRun]:
        """The runs that steered at one layer."""
        return self.single_layers(self.runs)

    def single_layers(self, records: Iterable[SteeringRecord]) -> list[SteeringRun]:
        """Those of some recorded runs that steered at one layer."""
        return [self._run(each) for each in records if len(each.config.layers) == 1]

    def _run(self, record: SteeringRecord) -> SteeringRun:
        config, result = record.config, record.result
        return SteeringRun(
            layer=config.layers[0],
            method=config.methods[0],
            component=config.component,
            coefficient=config.coefficients[0] if config.coefficients else 0.0,
            trait_mean=result.trait_mean,
            coherence_mean=result.coherence_mean,
            delta=result.trait_mean - self.baseline.trait_mean,
            vector_digest=record.vector_digest,
            standard_error=result.standard_error,
            null=None if result.null is None else tuple(result.null),
            null_covariance=result.null_covariance,
        )
