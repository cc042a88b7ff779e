"""The format of a projection file: its content as a model that checks it. Loads no torch.

ProjectionFile.read(path).trajectory      # (prompt, response), at the vector's own layer
"""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from tlcapture.captures.intervention_record import InterventionRecord
from tlcapture.errors import StorageError
from tlcapture.names import PromptId, capture_name, of_variant
from tlcapture.prompts.spans import TokenSpan, check_spans
from tlcapture.storage.experiments.projection_places import ProjectionPlace, place_of_projection
from tlcapture.storage.files import read_json
from tlcapture.storage.validation import Count, FileContent, Layer, Number, Share, checked
from tlcapture.text import as_ranges, layers_named
from tlcapture.traits.calibration import Calibration, CalibrationRecord
from tlcapture.views.hooks import POINTS
from tlcapture.views.kept_tokens import Positions, spread_rows, stated_positions

_MOST_LAYERS = 1000
_LAST = ("residual_out", "attn_out")  # the sublayer whose scores are the trajectory


class Labelled(FileContent):
    """Content with optional labels; null counts as missing."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_no_label(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        fields = cls.model_fields.items()
        nulls = {name for name, field in fields if not field.is_required() and value.get(name, "") is None}
        return {key: each for key, each in value.items() if key not in nulls} if nulls else value


class Part(Labelled):
    """Prompt or response. The number of tokens and the text are optional."""

    tokens: list[str]
    text: str = ""
    n_tokens: int | None = None

    @model_validator(mode="after")
    def _counts_agree(self) -> Part:
        if self.n_tokens not in (None, len(self.tokens)):
            raise ValueError(f"n_tokens is {self.n_tokens}, but tokens has {len(self.tokens)}")
        return self


class Scores(FileContent):
    """`[n_tokens][n_layers][n_sublayers]` of each part, null for a layer that the capture did not keep.

    A file with `positions` holds only those tokens.
    """

    prompt: list[list[list[Number] | None]]
    response: list[list[list[Number] | None]]


class SpanDynamics(FileContent):
    """The mean and the dynamics of the trajectory within one span."""

    kind: str
    role: str | None
    start: Count
    stop: Count
    mean: Number | None
    peak_velocity: Number | None
    commitment_point: Count | None = None
    commitment_shift: Number | None = None
    commitment_p: Share | None = None


class DynamicsRecord(FileContent):
    """The dynamics, as computed when the file was written."""

    commitment_point: Count | None
    persistence: Count | None
    commitment_shift: Number | None = None
    commitment_p: Share | None = None
    peak_velocity: Number | None = None
    velocity: list[Number | None] | None = None
    acceleration: list[Number | None] | None = None
    by_span: list[SpanDynamics] | None = None


class VectorSource(FileContent):
    """The vector and how it was selected; the trajectory is taken at its layer."""

    layer: Layer
    trait: str | None = None
    method: str | None = None
    component: str | None = None
    model: str | None = None
    experiment: str | None = None
    selected_by: str | None = None
    score: Number | None = None
    calibration: CalibrationRecord | None = None


class ReferenceRises(FileContent):
    """Mean and deviation of a vector's rise over `n` reference prompts; earlier files do not have their number."""

    mean: Number
    sd: Number = Field(gt=0)
    n: int | None = Field(default=None, ge=2)


class ChanceRecord(FileContent):
    """The results of random directions on the same capture; see `ChanceLevel` in `traits/statistics/chance`."""

    n_directions: int = Field(ge=1)
    covariance: str | None = None
    directions: str
    commit: Count
    persist: Count | None
    commitment: Share | None = None
    persistence: Share | None = None
    rises: list[Number] | None
    reference_rises: ReferenceRises | None = None
    standardised_rises: list[Number] | None = None

    @property
    def is_isotropic(self) -> bool:
        """Whether there was no reference, so that all directions were equally likely."""
        return self.covariance == "isotropic"

    @model_validator(mode="after")
    def _counts_agree(self) -> ChanceRecord:
        if max(self.commit, self.persist or 0) > self.n_directions:
            raise ValueError(f"more than its {self.n_directions} directions commit or persist")
        for name in ("rises", "standardised_rises"):
            values = getattr(self, name)
            if values is not None and len(values) != self.n_directions:
                raise ValueError(f"{name} has {len(values)} values for {self.n_directions} directions")
        return self


class Means(FileContent):
    """Statistics of the trajectory without its first token: means of prompt and response, deviation of both.

    `response_deviation` is there, as 0, where only the response varies by no more than rounding.
    """

    prompt: Number | None
    response: Number | None
    deviation: Number | None
    response_deviation: Number | None = None


class ProjectionMetadata(Labelled):
    """The vector, the capture, and doubts about projecting one onto the other.

    `positions` are the tokens whose scores the file holds, and `means` were taken before others were dropped. With a
    deviation of 0 they are those of a trajectory that varies by no more than rounding.
    """

    vector_source: VectorSource
    sublayers: list[str] | None = Field(default=None, min_length=1)
    layers: list[Layer] | None = None
    prompt_set: str | None = None
    variant: str | None = None
    interventions: list[InterventionRecord] = Field(default_factory=list)
    prompt_id: PromptId | None = None
    sample: int | None = Field(default=None, ge=1)
    inference_model: str | None = None
    warnings: list[str] = Field(default_factory=list)
    definitions: int = Field(default=1, ge=1)
    chance: ChanceRecord | None = None
    positions: list[Count] | None = None
    means: Means | None = None


class ProjectionFile(Labelled):
    """One capture's projection onto one trait's vector, every score finite and of one shape."""

    prompt: Part
    response: Part
    projections: Scores
    metadata: ProjectionMetadata
    dynamics: DynamicsRecord | None = None
    spans: list[TokenSpan] = Field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> ProjectionFile:
        """Read a projection file; raises `StorageError` for any other file."""
        return cls.parse(read_json(path), path)

    @classmethod
    def parse(cls, content: Any, path: Path) -> ProjectionFile:
        """Check the content of a projection file; raises `StorageError` with file, field and reason.

        Its prompt and trait must be the ones in the path of a JSON file in an experiment.
        """
        found, place = checked(cls, content, path, "projection"), place_of_projection(path)
        if place is not None and (others := found._named_otherwise(place)):
            raise StorageError(f"{path}: its metadata names {', '.join(others)}: it was moved or renamed")
        return found

    def _named_otherwise(self, place: ProjectionPlace) -> list[str]:
        """The fields of the metadata that contradict the path; a trait may be named without its category."""
        metadata, source = self.metadata, self.metadata.vector_source
        last = "attn_out" if metadata.sublayers and metadata.sublayers[-1] == "attn_out" else None
        name, prompt_set = metadata.prompt_id, metadata.prompt_set
        named = [
            ("prompt", None if name is None else capture_name(name, metadata.sample), [place.prompt_id]),
            ("prompt set", prompt_set and of_variant(prompt_set, metadata.variant), [place.prompt_set]),
            ("trait", source.trait, [str(place.trait), place.trait.name]),
            ("component", source.component or last, [place.component]),
        ]
        return [f"{what} {each}" for what, each, expected in named if each is not None and str(each) not in expected]

    def sublayers(self, component: str = "residual") -> list[str]:
        """Names of the scores of a layer: from the file, or the usual ones of a component."""
        if not self.scores:
            return self.metadata.sublayers or []
        n_scores = len(next(at for at in self.scores[0] if at))
        usual = list(POINTS) if n_scores == len(POINTS) else [f"score {number}" for number in range(n_scores)]
        if n_scores == 1:
            usual = ["attn_out" if component == "attn_out" else "residual_out"]
        return self.metadata.sublayers or usual

    @property
    def tokens(self) -> list[str]:
        """Tokens of prompt and response as one sequence."""
        return self.prompt.tokens + self.response.tokens

    @property
    def positions(self) -> Positions:
        """The tokens that have scores."""
        n_prompt = len(self.prompt.tokens)
        return stated_positions(self.metadata, n_prompt, n_prompt + len(self.response.tokens))

    @property
    def scores(self) -> list[list[list[float] | None]]:
        """Scores of prompt and response as one sequence, of the tokens in `positions`."""
        return self.projections.prompt + self.projections.response

    @property
    def calibration(self) -> Calibration | None:
        """Where the vector's examples lie on the scale of the scores; `None` where that is not recorded."""
        return Calibration.of_record(self.metadata.vector_source.calibration)

    @property
    def n_layers(self) -> int:
        """Layers of the model, whether kept or not."""
        return len(self.scores[0]) if self.scores else max(self.layers) + 1

    @property
    def layers(self) -> list[int]:
        """The layers that the capture kept."""
        if not self.scores:
            return list(self.metadata.layers or ())
        return [layer for layer, at in enumerate(self.scores[0]) if at is not None]

    @property
    def trajectory(self) -> tuple[list[float], list[float]]:
        """The last sublayer's scores at the vector's own layer, of prompt and response; NaN without one."""
        layer, n_prompt = self.metadata.vector_source.layer, len(self.prompt.tokens)
        rows = [at[-1] for token in self.scores if (at := token[layer]) is not None]  # never null: the layer was kept
        whole = spread_rows(rows, self.positions, nan)
        return whole[:n_prompt], whole[n_prompt:]

    @model_validator(mode="before")
    @classmethod
    def _has_a_place_for_every_layer(cls, value: Any) -> Any:
        """Put null in place of the layers that a slim file lacks, which holds only those of its list `layers`.

        Each layer goes to its place, since the list may have another order.
        """
        try:
            stated = value.get("layers")
            layers = stated or value["metadata"].get("layers")
            parts = {name: value["projections"][name] for name in ("prompt", "response")}
            lengths = {len(row) for part in parts.values() for row in part}
        except (AttributeError, KeyError, TypeError):  # checked by the other validators
            return value
        if not isinstance(layers, list) or not layers or not lengths:
            return value
        if not all(type(layer) is int and 0 <= layer < _MOST_LAYERS for layer in layers) or len({*layers}) < len(
            layers
        ):
            raise ValueError("layers: expected different numbers of layers, counted from 0")
        if lengths != {len(layers)}:
            if stated and max(lengths) <= max(layers):
                raise ValueError(
                    f"{as_ranges(sorted(lengths))} scores per token for {len(layers)} layers in the list layers"
                )
            return value
        if layers == list(range(len(layers))):
            return value
        spread = {name: [_spread(row, layers) for row in part] for name, part in parts.items()}
        return {**value, "projections": {**value["projections"], **spread}}

    @model_validator(mode="after")
    def _is_of_one_shape(self) -> ProjectionFile:
        held = self.positions
        check_spans(self.spans, held.n_tokens)
        for name in ("prompt", "response"):
            n_tokens, n_scores = len(getattr(held, name)), len(getattr(self.projections, name))
            if n_tokens != n_scores:
                raise ValueError(
                    f"the numbers of projections and tokens differ: {n_scores} for {n_tokens} tokens of the {name}"
                )
        if not held.kept:
            self._check_without_scores(held)
            return self
        n_layers, n_sublayers = len(self.scores[0]), max((len(at) for at in self.scores[0] if at), default=0)
        shape = [None if at is None else n_sublayers for at in self.scores[0]]
        if any([None if at is None else len(at) for at in token] != shape for token in self.scores):
            raise ValueError("its tokens differ in their numbers of layers or sublayers")
        if not n_sublayers:
            raise ValueError("its tokens have no scores")
        self._check_metadata(n_layers, n_sublayers)
        self._check_dynamics(held.n_tokens)
        return self

    def _check_without_scores(self, held: Positions) -> None:
        """Check a file without scores, whose response was too short for the tokens to keep."""
        layers, sublayers = self.metadata.layers, self.metadata.sublayers
        if not held.n_tokens:
            raise ValueError("it has no tokens")
        if not layers or not sublayers:
            raise ValueError("it has no scores, and its metadata does not state layers and sublayers")
        layer = self.metadata.vector_source.layer
        if layer not in layers:
            raise ValueError(f"a vector of layer {layer}, but layers {as_ranges(layers)} were kept")
        self._check_dynamics(held.n_tokens)

    def _check_metadata(self, n_layers: int, n_sublayers: int) -> None:
        layer, sublayers = self.metadata.vector_source.layer, self.metadata.sublayers
        if layer >= n_layers:
            raise ValueError(f"a vector of layer {layer}, but scores of {n_layers} layers")
        if layer not in self.layers or sorted(self.metadata.layers or self.layers) != self.layers:
            stated = "" if self.metadata.layers is None else f", and metadata states {as_ranges(self.metadata.layers)}"
            raise ValueError(f"a vector of layer {layer}, but scores of {layers_named(self.layers)}{stated}")
        if sublayers is not None and len(sublayers) != n_sublayers:
            raise ValueError(f"{n_sublayers} scores per layer, but {len(sublayers)} sublayers")
        if sublayers is not None and len({*sublayers}) < len(sublayers):
            raise ValueError(f"sublayers {', '.join(sublayers)}: expected different names")
        if sublayers is not None and sublayers[-1] not in _LAST:
            raise ValueError(
                f"sublayers end with {sublayers[-1]}, expected {' or '.join(_LAST)}, the one of the trajectory"
            )

    def _check_dynamics(self, n_tokens: int) -> None:
        found = self.dynamics
        if found is None:
            return
        if found.commitment_point is not None and found.commitment_point >= n_tokens:
            raise ValueError(f"commitment point {found.commitment_point} of {n_tokens} tokens")
        if found.persistence is not None and found.persistence >= n_tokens:
            raise ValueError(f"persistence of {found.persistence} in {n_tokens} tokens")
        for name, expected in (("velocity", n_tokens - 1), ("acceleration", max(0, n_tokens - 2))):
            values = getattr(found, name)
            if values is not None and len(values) != expected:
                raise ValueError(f"{name} has {len(values)} values for {n_tokens} tokens, expected {expected}")


def _spread(row: list[Any], layers: list[int]) -> list[Any]:
    found: list[Any] = [None] * (max(layers) + 1)
    for layer, scores in zip(layers, row, strict=True):
        found[layer] = scores
    return found
