"""Projecting the residual stream onto trait vectors: `h . v / ||v||`.

All vectors of a component are projected in one matrix product over the buffer of all residual points.

Source: the projection of an activation onto a concept direction, as in Zou et al., "Representation
Engineering" (2023), and Chen et al., "Persona Vectors" (2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from math import isfinite, isnan
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tlcapture.coloured_tokens import ColouredTokens
from tlcapture.errors import InputError, NotKeptError, NumericalError, VectorError
from tlcapture.products import linear
from tlcapture.shapes import Trajectory, Vector, Vectors
from tlcapture.storage.rounding import PROJECTION_DIGITS, round_significant, rounded_for_json
from tlcapture.text import layers_named
from tlcapture.traits.calibration import recorded_calibration, shifted
from tlcapture.traits.centring import Centred, subtract_means
from tlcapture.traits.origin import recorded_origin
from tlcapture.traits.projections.files import ProjectionFile
from tlcapture.traits.selection import Selection
from tlcapture.traits.statistics.chance import ChanceLevel, RandomDirections, with_gaps
from tlcapture.traits.statistics.dynamics import Dynamics, Motion, dynamics, dynamics_to_json
from tlcapture.traits.statistics.rounding_noise import constant_from, still_from
from tlcapture.traits.vectors import TraitVector
from tlcapture.views.kept_points import KeptPoints
from tlcapture.views.kept_tokens import Positions
from tlcapture.views.residual import ResidualStream

_PIECE = 2**24  # activations per matrix product
_PIECE_ON_CPU = 2**18  # which fit into a core's cache as float32

PromptScores = Float[Tensor, "n_prompt_tokens n_layers n_sublayers"]
ResponseScores = Float[Tensor, "n_response_tokens n_layers n_sublayers"]


@dataclass(frozen=True, eq=False, repr=False)
class Projection:
    """One capture's projection onto one trait vector.

        found = cap.project("behavioral/refusal")
        found.trajectory, found.calibration, found.rise, found.dynamics.commitment_point, found.chance.commit
        found.coloured(), found.means(), found.movement, found.source(), found.to_json()

    `prompt` and `response` are `[n_tokens, n_layers, n_sublayers]`, in units of the activations;
    `sublayers` are the residual points that the capture keeps, or `attn_out` alone. `layers` are the layers
    that it keeps (for `attn_out`, only those with attention); the scores of all others are NaN. `chance` has
    the results of random directions on the same capture, if measured; `centred` the offset subtracted from every
    score, if any. `tokens` are the capture's, if known. The scores of tokens that the capture does
    not hold (if `held` is not all of them) are NaN. `still_from` is the token from which the trajectory varies by no
    more than the rounding of activations, 1 or the first of the response, so that it has no dynamics there; `None` if
    its response varies by more.
    """

    vector: TraitVector
    selection: Selection
    prompt: PromptScores
    response: ResponseScores
    layers: tuple[int, ...]
    sublayers: tuple[str, ...]
    dynamics: Dynamics
    chance: ChanceLevel | None = None
    centred: Centred | None = None
    tokens: tuple[str, ...] = ()
    held: Positions | None = None
    still_from: int | None = None

    def __repr__(self) -> str:
        score = "" if self.selection.score is None else f" {self.selection.score:.3g}"
        point, persistence = self.dynamics.commitment_point, self.dynamics.persistence
        return (
            f"Projection({self.vector.trait}, {self._title()} (by {self.selection.selected_by}{score}), "
            f"{len(self.prompt)} + {len(self.response)} tokens, "
            f"{self._does_not('commit', len(self.prompt)) if point is None else f'commits at token {point}'}, "
            f"{self._does_not('persist', 1) if persistence is None else f'persistence {persistence}'})"
        )

    def _does_not(self, what: str, start: int) -> str:
        """Say that a trajectory does not do something; unknown unless the capture holds all tokens from `start` on."""
        is_known = self.held is None or self.held.has_all(max(1, start), self.held.n_tokens)
        return f"does not {what}" if is_known else f"unknown whether it {what}s"

    def _repr_html_(self) -> str:
        head = f"<code>{escape(repr(self))}</code>"
        return head + (self.coloured()._repr_html_() if self.tokens else "")

    def coloured(self) -> ColouredTokens:
        """The tokens, coloured by the trajectory; raises `InputError` for a projection without tokens."""
        if not self.tokens:
            raise InputError("this projection has no tokens: use that of a capture, cap.project(trait)")
        label = f"{self.vector.trait}, {self._title()}"
        scores = [None if isnan(score) else score for score in self.trajectory.tolist()]
        return ColouredTokens(self.tokens, len(self.prompt), scores, label)

    def _title(self) -> str:
        return f"{self.vector.component}, {self.vector.method} of layer {self.vector.layer}"

    @property
    def trajectory(self) -> Trajectory:
        """`s[t]`: the last sublayer's projection at the vector's own layer, prompt and response as one sequence."""
        return torch.cat([part[:, self.vector.layer, -1] for part in (self.prompt, self.response)])

    @property
    def movement(self) -> Float[Tensor, " n_tokens"]:
        """The trajectory in float64, constant from the token from which it is still."""
        return constant_from(self.trajectory.double(), self.still_from)

    @property
    def calibration(self) -> dict[str, Any] | None:
        """The positions of the vector's examples on the scale of the scores; `None` if not recorded."""
        record = recorded_calibration(self.vector.metadata, self.vector.method, self.vector.layer)
        return record if self.centred is None else shifted(record, self.centred.offset)

    def means(self) -> dict[str, float | None]:
        """The trajectory's mean over the prompt and over the response, and its deviation over both.

        The first token is left out. Null if there is no token, or the capture lacks one. Where the response is still
        and the prompt is not, the key `response_deviation`, 0, says so.
        """
        values, begins = self.movement, len(self.prompt)
        response = values[max(1, begins) :]
        found = {
            "prompt": values[1:begins].mean(),
            "response": response.mean(),
            "deviation": values[1:].std(correction=0),
        }
        if (self.still_from or 1) > 1:
            found["response_deviation"] = response.std(correction=0)
        return {
            name: None if each.isnan() else float(round_significant(float(each), PROJECTION_DIGITS))
            for name, each in found.items()
        }

    @property
    def rise(self) -> float | None:
        """The mean over the response less that over the prompt, as `chance.standard_score`; `None` if unknown."""
        means, chance = self.means(), self.chance
        if chance is None or means["prompt"] is None or means["response"] is None:
            return None
        return chance.standard_score(means["response"] - means["prompt"])

    def to_json(self) -> dict[str, Any]:
        """The keys `projections` and `dynamics` of a projection file."""
        return projections_to_json([self])[0]

    def source(self) -> dict[str, Any]:
        """The key `vector_source` of a projection file's metadata."""
        return {
            "model": self.vector.model,
            "experiment": self.vector.experiment,
            "trait": str(self.vector.trait),
            "method": self.vector.method,
            "layer": self.vector.layer,
            "component": self.vector.component,
            "selected_by": self.selection.selected_by,
            "score": self.selection.score,
            "calibration": self.calibration,
            "origin": recorded_origin(self.vector.metadata),
        }


def projections_to_json(projections: Sequence[Projection], kept: Positions | None = None) -> list[dict[str, Any]]:
    """The keys `projections` and `dynamics` of the files of a capture's projections.

    They have the scores of the tokens in `kept`, which the capture holds; `None` means all that it holds.
    """
    if not projections:
        return []
    kept = kept or projections[0].held
    prompts, responses = [each.prompt for each in projections], [each.response for each in projections]
    if kept is not None and not kept.is_all:
        prompts = [each[list(kept.prompt)] for each in prompts]
        responses = [each[list(kept.response)] for each in responses]
    layers = projections[0].layers
    parts = {"prompt": _scores_to_json(prompts, layers), "response": _scores_to_json(responses, layers)}
    motions = dynamics_to_json([each.dynamics for each in projections])
    return [
        {"projections": {part: found[row] for part, found in parts.items()}, "dynamics": motion}
        for row, motion in enumerate(motions)
    ]


def _scores_to_json(scores: Sequence[Tensor], layers: Sequence[int]) -> Any:
    """`[n_projections][n_tokens][n_layers][n_sublayers]`, rounded together, with null for each layer not kept."""
    n_layers, stacked = scores[0].shape[1], torch.stack(list(scores)).float()
    if len(layers) == n_layers:
        return rounded_for_json(stacked.numpy(), PROJECTION_DIGITS)
    rounded = rounded_for_json(stacked[:, :, list(layers)].numpy(), PROJECTION_DIGITS)
    row_of = {layer: row for row, layer in enumerate(layers)}
    return [
        [[token[row_of[layer]] if layer in row_of else None for layer in range(n_layers)] for token in each]
        for each in rounded
    ]


def project(
    prompt: ResidualStream,
    response: ResidualStream,
    chosen: Sequence[tuple[TraitVector, Selection]],
    *,
    random: RandomDirections | None = None,
    centre: Callable[[TraitVector], Vector] | None = None,
    held: Positions | None = None,
    scores: Sequence[Tensor] | None = None,
) -> list[Projection]:
    """Project prompt and response onto vectors of one component, in one matrix product each.

    Args:
        held: the tokens of prompt and response that have activations; `None` means all.
        random: directions whose dynamics and rises are measured too, as a chance level.
        centre: the mean activation at a vector's layer, to subtract from all activations before they are projected.
        scores: the result of `scores_of`, if it was computed already; `centre` changes it in place.

    Raises:
        VectorError: a vector has another width than the activations, or a layer that the model does not have or the
            capture does not keep.
        NumericalError: a projection is NaN or inf.
    """
    if not chosen:
        return []
    vectors = [vector for vector, _ in chosen]
    component = vectors[0].component
    for vector in vectors:
        check_fits(vector, prompt.n_layers, prompt.points.shape[-1])
        check_kept(vector, prompt.kept, prompt.with_attention)
    held = held or Positions.of(None, prompt.n_tokens, prompt.n_tokens + response.n_tokens)
    if scores is None:
        prompt, response = prompt.checked(), response.checked()
        scores = scores_of(prompt, response, vectors)
    activations = _at_own_layers(prompt, response, vectors)
    still = still_from(_trajectories(scores, vectors), vectors, activations, held)
    none = [None] * len(vectors)
    centred = none if centre is None else subtract_means(scores, vectors, activations, centre, held)
    if not held.is_all:
        scores = with_gaps(torch.cat(list(scores), dim=1), held).tensor_split([held.n_prompt], dim=1)
    trajectories = _trajectories(scores, vectors).double()
    for row, start in still.items():
        trajectories[row] = constant_from(trajectories[row], start)
    motion = Motion.of(trajectories, held.n_prompt, held)
    chance = random.levels(activations, vectors, held, motion) if random else none
    is_residual = component == "residual"
    layers = prompt.kept.layers if is_residual else prompt.output_layers
    sublayers = prompt.kept.points if is_residual else ("attn_out",)
    return [
        Projection(
            vector,
            selection,
            scores[0][row],
            scores[1][row],
            layers,
            sublayers,
            found,
            chance[row],
            centred[row],
            held=None if held.is_all else held,
            still_from=still.get(row),
        )
        for row, ((vector, selection), found) in enumerate(zip(chosen, motion.dynamics(), strict=True))
    ]


def scores_of(
    prompt: ResidualStream, response: ResidualStream, vectors: Sequence[TraitVector], device: torch.device | None = None
) -> list[Tensor]:
    """The scores `[n_vectors, n_tokens, n_layers, n_sublayers]` of prompt and of response, in one matrix product each.

    They are NaN for a layer without activations. `device` is where the products are computed, by default where the
    activations are. Raises `NumericalError` for NaN or inf among the activations.
    """
    units = torch.stack([vector.unit for vector in vectors])
    directions = units.to(prompt.points.device if device is None else device)
    return [_scores(part, vectors[0].component, directions) for part in (prompt, response)]


def check_fits(vector: TraitVector, n_layers: int, d_model: int) -> None:
    """Raise `VectorError` for a vector of another width, or of a layer that the model does not have."""
    origin = f"{vector.method} vector of {vector.trait} at layer {vector.layer} in experiment {vector.experiment!r}"
    if len(vector.vector) != d_model:
        raise VectorError(
            f"the {origin} has width {len(vector.vector)}, but the activations have width {d_model}: it is from "
            "another model; extract it from this one"
        )
    if vector.layer >= n_layers:
        raise VectorError(f"the {origin} is from another model: the captured one has layers 0 to {n_layers - 1}")


def check_kept(vector: TraitVector, kept: KeptPoints, with_attention: Sequence[int] | None = None) -> None:
    """Raise `NotKeptError` if a capture does not keep the activations of a vector's trajectory, `VectorError` if the
    layer has none.

    `with_attention` are the layers that have `attn_out`; `None` where all have it.
    """
    origin = f"the {vector.method} vector of {vector.trait} is of layer {vector.layer}"
    if vector.layer not in kept.layers:
        raise NotKeptError(
            f"{origin}, but the capture has only {layers_named(kept.layers)}: choose another with --layer, or "
            f"recapture with --layers {','.join(map(str, sorted({*kept.layers, vector.layer})))}",
            vector.layer,
        )
    if vector.component == "attn_out" and with_attention is not None and vector.layer not in with_attention:
        raise VectorError(
            f"{origin}, which has no attention: choose one of {layers_named(with_attention)} with --layer"
        )
    if vector.component == "residual" and "residual_out" not in kept.points:
        raise NotKeptError(
            f"{origin} and projects residual_out, but only {', '.join(kept.points)} was kept: capture again with "
            f"--points {','.join([*kept.points, 'residual_out'])}",
            vector.layer,
        )


def dynamics_of_file(content: ProjectionFile) -> Dynamics:
    """The dynamics of a projection file, recomputed from its scores."""
    return dynamics(movement_of_file(content), len(content.trajectory[0]), content.positions)


def movement_of_file(content: ProjectionFile) -> Float[Tensor, " n_tokens"]:
    """The trajectory of a projection file, as `Projection.movement`."""
    prompt, response = content.trajectory
    values, means = torch.tensor([*prompt, *response], dtype=torch.float64), content.metadata.means
    if means is None:
        return values
    still_response = max(1, len(prompt)) if means.response_deviation == 0 else None
    return constant_from(values, 1 if means.deviation == 0 else still_response)


def _trajectories(scores: Sequence[Tensor], vectors: Sequence[TraitVector]) -> Float[Tensor, "n_vectors n_tokens"]:
    """The last sublayer's scores at each vector's own layer, prompt and response as one sequence."""
    rows, layers = torch.arange(len(vectors)), torch.tensor([each.layer for each in vectors])
    return torch.cat([part[rows, :, layers, -1] for part in scores], dim=1)


def _at_own_layers(
    prompt: ResidualStream, response: ResidualStream, vectors: Sequence[TraitVector]
) -> dict[int, Float[Tensor, "n_tokens d_model"]]:
    """The activations that the vectors are projected onto at their own layers, prompt and response as one sequence."""
    point = "residual_out" if vectors[0].component == "residual" else "attn_out"
    layers = {vector.layer for vector in vectors}
    return {layer: torch.cat([part.at(layer, point) for part in (prompt, response)]) for layer in layers}


def _scores(part: ResidualStream, component: str, directions: Vectors) -> Float[Tensor, "n_vectors ..."]:
    """`[n_vectors, n_tokens, n_layers, n_sublayers]`, NaN where a layer is not kept or has no attn_out."""
    kept, part = part.kept, part.checked()
    if component == "attn_out":
        if part.attn_out is None:
            raise VectorError("the capture holds no attn_out: capture again with --capture-attn")
        layers, found = part.output_layers, _products(part.attn_out, directions).permute(2, 1, 0).unsqueeze(-1)
    else:
        layers, products = kept.layers, _products(part.points, directions)  # [n_points, n_tokens, n_vectors]
        found = products[_rows(kept)].permute(3, 2, 0, 1)
    found = found.contiguous()  # each vector's scores are read as one block
    if len(layers) == kept.n_layers:
        return found
    whole = found.new_full((*found.shape[:2], kept.n_layers, found.shape[3]), torch.nan)
    whole[:, :, list(layers)] = found
    return whole


@lru_cache(maxsize=8)
def _rows(kept: KeptPoints) -> Tensor:
    return torch.tensor(kept.rows)


def _products(activations: Tensor, directions: Vectors) -> Tensor:
    """Products on the device of the directions, to which activations are moved piece by piece, and become float32."""
    device = directions.device
    rows = max(1, (_PIECE_ON_CPU if device.type == "cpu" else _PIECE) // max(1, activations[0].numel()))
    pieces = (each.to(device).float() for each in activations.split(rows))
    products = torch.cat([linear(each, directions) for each in pieces]).cpu()
    # A sum is finite only if all its terms are; where it is not, it may have overflowed.
    if not isfinite(float(products.sum())) and not products.isfinite().all():
        raise NumericalError("a projection is NaN or inf: the captured activations are damaged")
    return products
