"""Projecting a capture in Python: choosing vectors, warning of doubts about them, comparing with random directions.

Importing this module loads torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from operator import index
from typing import Any, SupportsIndex

import torch

from tlcapture.captures.capture import Capture
from tlcapture.commands.projecting.projections import random_directions
from tlcapture.errors import InputError, warn_user
from tlcapture.explore.doubts import tell
from tlcapture.names import Trait
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import FileState
from tlcapture.traits.calibration import Calibration, CalibrationRecord
from tlcapture.traits.choice import ChosenVector, VectorChoice, choose_vectors
from tlcapture.traits.missing_vectors import no_component_vectors
from tlcapture.traits.projections.own_direction import project_direction
from tlcapture.traits.projections.projection import Projection, project
from tlcapture.traits.projections.token_scores import TokenScores
from tlcapture.traits.statistics.chance import RandomDirections
from tlcapture.traits.verdicts import Doubts, UsedVector
from tlcapture.views.hooks import check_component
from tlcapture.views.kept_points import from_the_end


def project_traits(
    capture: Capture,
    own: Layout,
    traits: Sequence[str],
    *,
    layer: SupportsIndex | str = "auto",
    method: str | None = None,
    component: str = "residual",
    vector_experiment: str | None = None,
) -> list[Projection]:
    """Project a capture onto vectors of the experiment `own` and onto random directions; warns of doubts.

    Raises as `ExplorableCapture.project` does.
    """
    named = tuple(Trait.parse(name) for name in traits)
    at = layer if isinstance(layer, str) else index(from_the_end(layer, capture.n_layers))
    choice = VectorChoice(at, method, vector_experiment, named)
    choice = choice.or_packaged(own, capture.metadata.get("inference_model"))
    source = choice.layout(own) if choice.is_fallback else own
    found = choose_vectors(source, choice, capture, check_component(component))
    if found.failures:
        raise found.failures[0][1]
    if not found.vectors:
        raise no_component_vectors(source, component)
    _tell_doubts(found.vectors, capture, Doubts(source.root))
    pairs = [(chosen.vector, chosen.selection) for chosen in found.vectors]
    prompt, response = capture.prompt.residual, capture.response.residual
    random = _random_directions(source, component, capture)
    projections = project(prompt, response, pairs, random=random, held=capture.positions)
    return [replace(projection, tokens=tuple(capture.tokens)) for projection in projections]


def project_own(capture: Capture, own: Layout | None, direction: Any, layer: Any, component: str) -> Projection:
    """Project a capture onto the user's own direction at a layer, and onto random directions if `own` is known."""
    if isinstance(layer, str):
        raise InputError("a direction of your own needs a layer: pass layer=12")
    at = index(from_the_end(layer, capture.n_layers))
    random = None
    if own is not None:
        choice = VectorChoice().or_packaged(own, capture.metadata.get("inference_model"))
        random = _random_directions(choice.layout(own), check_component(component), capture)
    return project_direction(capture, direction, at, check_component(component), random)


def with_tokens(capture: Capture, projection: Projection) -> TokenScores:
    """A projection with the capture's tokens, as figures and frames need it."""
    dynamics, calibration = projection.dynamics, projection.calibration
    return TokenScores(
        prompt_set=capture.capture_set,
        prompt_id=capture.prompt_id,
        trait=str(projection.vector.trait),
        component=projection.vector.component,
        method=projection.vector.method,
        layer=projection.vector.layer,
        tokens=projection.tokens,
        n_prompt_tokens=len(projection.prompt),
        scores=torch.cat([projection.prompt, projection.response]).double().numpy(),
        sublayers=projection.sublayers,
        layers=projection.layers,
        commitment_point=dynamics.commitment_point,
        persistence=dynamics.persistence,
        calibration=None if calibration is None else Calibration.of_record(CalibrationRecord(**calibration)),
        spans=capture.spans,
        positions=capture.positions.stated,
        sample=capture.sample,
        experiment=projection.vector.experiment,
    )


def _tell_doubts(chosen: Sequence[ChosenVector], capture: Capture, doubts: Doubts) -> None:
    found = []
    for each in chosen:
        vector = each.vector
        used = UsedVector(str(vector.trait), vector.component, vector.method, vector.layer, vector.experiment)
        notes = (*each.notes(capture.metadata), each.selection.warning, doubts.of(used))
        found += [(used.trait, note) for note in notes if note]
    tell(found)


def _random_directions(source: Layout, component: str, capture: Capture) -> RandomDirections:
    """The random directions to compare vectors of an experiment with, without results of earlier projections."""
    path = source.reference(component)
    state = FileState.of(path.stat()) if path.is_file() else None
    return replace(_drawn(source, component, state, capture.n_layers, capture.d_model), _drawn={})


@lru_cache(maxsize=4)
def _drawn(source: Layout, component: str, state: FileState | None, n_layers: int, d_model: int) -> RandomDirections:
    return random_directions(source, component, n_layers, d_model, warn_user)
