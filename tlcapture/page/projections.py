"""The page's content of a projection: its trajectory, dynamics, chance and vector."""

from __future__ import annotations

from dataclasses import asdict
from math import isnan
from typing import Any

import numpy as np

from tlcapture.errors import StorageError
from tlcapture.traits.projections.files import ProjectionFile
from tlcapture.traits.projections.saved import SavedProjection
from tlcapture.traits.projections.token_scores import dynamics_command
from tlcapture.traits.statistics.rises import DEFINITIONS, peak_of
from tlcapture.traits.verdicts import Doubts, used_vector


def projection_of(saved: SavedProjection, content: ProjectionFile, doubts: Doubts) -> dict[str, Any]:
    """A projection as JSON, with the doubts about its vector; raises `StorageError` for incomplete dynamics."""
    trait, component, path = saved.trait, saved.component, saved.path
    prompt, response = content.trajectory
    dynamics = content.dynamics
    if dynamics is None or dynamics.velocity is None or dynamics.acceleration is None:
        raise StorageError(f"{path}: its dynamics are incomplete: run '{dynamics_command(saved.json_path)}'")
    scale, is_current = content.calibration, content.metadata.definitions == DEFINITIONS
    vector = used_vector(content, str(trait), component)
    warnings = [*content.metadata.warnings, *filter(None, [vector and doubts.of(vector)])]
    if not is_current:
        warnings.append(f"its dynamics follow earlier definitions: run '{dynamics_command(saved.json_path)}'")
    held = content.positions
    has_peak = is_current and dynamics.persistence is not None and held.has_all(held.n_prompt, held.n_tokens)
    trajectory = [*prompt, *response]
    return {
        "trait": str(trait),
        "component": component,
        "trajectory": [None if isnan(score) else score for score in trajectory],
        "dynamics": dynamics.model_dump(exclude_unset=True),
        "peak": peak_of(np.array(trajectory), len(prompt)) if has_peak else None,
        "calibration": None if scale is None else asdict(scale),
        "chance": _chance(content),
        "vector": content.metadata.vector_source.model_dump(exclude_unset=True),
        "model": content.metadata.inference_model,
        "warnings": warnings,
        **({} if held.is_all else {"kept": held.described()}),
    }


def _chance(content: ProjectionFile) -> dict[str, Any] | None:
    """How many random directions commit and persist on the same capture, and the share that does so as clearly."""
    names = ("n_directions", "commit", "persist", "commitment", "persistence")
    return None if content.metadata.chance is None else {name: getattr(content.metadata.chance, name) for name in names}
