"""A trait's `results.json` while it is steered: reading what it holds, and adding to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from os.path import lexists
from typing import Any, NamedTuple

from tlcapture.captures.provenance import now
from tlcapture.extraction.judge import Judge
from tlcapture.extraction.monitoring import Monitoring
from tlcapture.extraction.steering import PerQuestion, SteeringQuestions, SteeringScore
from tlcapture.models.loading import Model
from tlcapture.names import Trait
from tlcapture.runs.run import Run
from tlcapture.storage.files import read_json, write_json
from tlcapture.storage.rounding import round_number, rounded_or_none
from tlcapture.traits.selection import COHERENT
from tlcapture.traits.steering_files import SteeringResults, SteeringRun
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vectors import TraitVector

_DIGITS = 5


class _Vector(NamedTuple):
    """The vector that responses were steered with."""

    component: str
    method: str
    layer: int

    @classmethod
    def of(cls, vector: TraitVector) -> _Vector:
        return cls(vector.component, vector.method, vector.layer)

    @classmethod
    def of_run(cls, run: Mapping[str, Any]) -> _Vector:
        config = run["config"]
        return cls(config.get("component", "residual"), config["methods"][0], config["layers"][0])

    @classmethod
    def of_monitoring(cls, monitoring: Mapping[str, Any]) -> _Vector:
        return cls(monitoring.get("component", "residual"), monitoring["method"], monitoring["layer"])


class _Cell(NamedTuple):
    """A vector and a coefficient, with which there is at most one run."""

    vector: _Vector
    coefficient: float

    @classmethod
    def of_run(cls, run: Mapping[str, Any]) -> _Cell | None:
        """The cell of a recorded run; `None` for a run with several layers."""
        config = run["config"]
        if len(config["layers"]) > 1:
            return None
        return cls(_Vector.of_run(run), (config.get("coefficients") or [0.0])[0])


class Results:
    """A trait's `results.json`, written after every run. Runs of another model, scorer or questions are dropped."""

    def __init__(self, run: Run, trait: Trait, model: Model, scored_by: str, asked: SteeringQuestions):
        layout = run.layout
        self._path = layout.steering(trait)
        self._files = VectorFiles(layout, trait)
        self._run = run
        self._content: dict[str, Any] = {"baseline": {}, "runs": []}
        questions = _digest(repr(asked.questions))
        if lexists(self._path):
            before = read_json(self._path)
            made = SteeringResults.parse(before, self._path).metadata
            is_same = (made.get("model_fingerprint"), made.get("scored_by")) == (model.fingerprint, scored_by)
            if is_same and made.get("questions") in (None, questions):
                self._content = before
        self._content["metadata"] = {
            "model": model.name,
            "model_fingerprint": model.fingerprint,
            "engine": model.engine,
            "scored_by": scored_by,
            "questions": questions,
            "timestamp": now(),
        }
        self._baseline: PerQuestion | None = None

    def set_baseline(self, score: SteeringScore) -> None:
        """Record the unsteered model's scores, from which gains are counted."""
        self._content["baseline"] = _means(score)
        self._baseline = score.trait

    @property
    def baseline_mean(self) -> float:
        """The unsteered model's `trait_mean`."""
        return float(self._content["baseline"]["trait_mean"])

    def find(self, vector: TraitVector, coefficient: float) -> SteeringRun | None:
        """The recorded run with the same vector and coefficient, if there is one."""
        record = self._record(vector, coefficient)
        return None if record is None else self._parsed(record)

    def responses(self, vector: TraitVector, coefficient: float) -> list[str] | None:
        """The responses of a recorded run, where they were recorded."""
        found = (self._record(vector, coefficient) or {}).get("responses")
        return found if isinstance(found, list) and all(isinstance(each, str) for each in found) else None

    def coefficients(self, vector: TraitVector) -> list[float]:
        """The coefficients with which a vector was recorded, in ascending order."""
        cells = filter(None, map(_Cell.of_run, self._content["runs"]))
        used = {cell.coefficient for cell in cells if cell.vector == _Vector.of(vector)}
        return sorted(each for each in used if self._record(vector, each) is not None)

    def add(self, vector: TraitVector, coefficient: float, score: SteeringScore) -> SteeringRun:
        """Record a run."""
        assert self._baseline is not None
        error = score.standard_error(self._baseline)
        means = _means(score)
        run = {
            "config": {
                "layers": [vector.layer],
                "methods": [vector.method],
                "coefficients": [coefficient],
                "component": vector.component,
            },
            "result": {
                **means,
                "gain": rounded_or_none(means["trait_mean"] - self.baseline_mean, _DIGITS),
                "standard_error": rounded_or_none(error, _DIGITS),
                "n": int((~score.trait.isnan()).sum()),
            },
            "vector_timestamp": vector.metadata.get("timestamp"),
            "vector_digest": self._files.digest(*_Vector.of(vector)),
            "responses": score.responses,
        }
        others = (each for each in self._content["runs"] if _Cell.of_run(each) != _Cell.of_run(run))
        self._content["runs"] = [*others, run]
        self._write()
        return self._parsed(run)

    def largest_gains(self, n: int) -> list[SteeringRun]:
        """The runs of present vectors with the largest gains, coherent ones first."""
        current = [run for run in self._content["runs"] if self._is_current(run)]
        runs = SteeringResults.parse({**self._content, "runs": current}, self._path).single_layer_runs
        return sorted(runs, key=lambda run: (run.coherence_mean >= COHERENT, run.delta), reverse=True)[:n]

    def set_null(self, run: SteeringRun, gains: Sequence[float], covariance: str) -> None:
        """Record the gains of random vectors of a covariance in place of a run's vector."""
        cell = _Cell(_Vector(run.component, run.method, run.layer), run.coefficient)
        for record in self._content["runs"]:
            if _Cell.of_run(record) == cell:
                record["result"]["null"] = [rounded_or_none(gain, _DIGITS) for gain in gains]
                record["result"]["null_covariance"] = covariance
        self._write()

    def has_monitoring(self, vector: TraitVector, coefficients: Sequence[float], covariance: str) -> bool:
        """Whether the responses of these runs have been compared with random vectors of a covariance, or a better one.

        That of the reference is better than none, `isotropic`.
        """
        digest = self._files.digest(*_Vector.of(vector))
        return any(
            each.get("vector_digest") == digest
            and each["coefficients"] == list(coefficients)
            and each.get("null_covariance") in (covariance, "reference")
            for each in self._content.get("monitoring", ())
            if _Vector.of_monitoring(each) == _Vector.of(vector)
        )

    def set_monitoring(self, vector: TraitVector, found: Monitoring, covariance: str) -> None:
        """Record how projections of a vector's steered responses follow the coefficient, beside random vectors."""
        key, values = _Vector.of(vector), {name: _rounded(value) for name, value in asdict(found).items()}
        made = {"layer": vector.layer, "method": vector.method, "component": vector.component, **values}
        made["null_covariance"] = covariance
        others = [each for each in self._content.get("monitoring", ()) if _Vector.of_monitoring(each) != key]
        self._content["monitoring"] = [*others, {**made, "vector_digest": self._files.digest(*key)}]
        self._write()

    def _record(self, vector: TraitVector, coefficient: float) -> dict[str, Any] | None:
        cell, made = _Cell(_Vector.of(vector), coefficient), vector.metadata.get("timestamp")
        for run in self._content["runs"]:
            if _Cell.of_run(run) == cell and run.get("vector_timestamp") == made and self._is_current(run):
                return dict(run)
        return None

    def _is_current(self, run: dict[str, Any]) -> bool:
        vector, digest = _Vector.of_run(run), run.get("vector_digest")
        return digest is None or (self._files.file(*vector).is_file() and digest == self._files.digest(*vector))

    def _parsed(self, run: dict[str, Any]) -> SteeringRun:
        return SteeringResults.parse({**self._content, "runs": [run]}, self._path).single_layer_runs[0]

    def _write(self) -> None:
        self._run.wrote(write_json(self._path, self._content, indent=True))


def scored_by(judge: Judge | None, eval_prompt: str | None) -> str:
    """The scorer of `trait_mean`; runs that were scored in different ways are never mixed."""
    if judge is None:
        return "likelihood"
    asked = "" if eval_prompt is None else f", eval_prompt {_digest(eval_prompt, 4)}"
    return f"judge {judge.url}{asked}"


def _digest(text: str, size: int = 8) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).hexdigest()


def _means(score: SteeringScore) -> dict[str, float]:
    means = {"trait_mean": score.trait_mean, "coherence_mean": score.coherence_mean}
    return {name: round_number(value, _DIGITS) for name, value in means.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return rounded_or_none(value, _DIGITS) if isinstance(value, float) else value
