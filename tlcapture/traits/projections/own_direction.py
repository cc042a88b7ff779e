"""The projection of a capture onto the user's own direction, which is not a trait's vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tlcapture.captures.capture import Capture
from tlcapture.errors import VectorError
from tlcapture.names import Trait
from tlcapture.traits.projections.projection import Projection, project
from tlcapture.traits.selection import Selection
from tlcapture.traits.statistics.chance import RandomDirections
from tlcapture.traits.vectors import TraitVector, check_direction

OWN = Trait("own", "direction")
_NO_METADATA: Mapping[str, Any] = {}


def project_direction(
    capture: Capture, direction: Any, layer: int, component: str, random: RandomDirections | None = None
) -> Projection:
    """Project a capture onto a direction `[d_model]` at a layer, as `own/direction`, and onto `random` ones if given.

    Raises `VectorError` unless it is finite, not zero, and of the capture's width.
    """
    try:
        vector = torch.as_tensor(direction).detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise VectorError(
            f"a direction of type {type(direction).__name__}: expected a tensor or an array [{capture.d_model}]"
        ) from None
    if vector.shape != (capture.d_model,):
        raise VectorError(f"a direction of shape {list(vector.shape)}: expected [{capture.d_model}]")
    check_direction(vector, "the direction")
    own = TraitVector(OWN, component, "own", layer, "", vector, _NO_METADATA)
    chosen = [(own, Selection(layer, "own", "override"))]
    streams = capture.prompt.residual, capture.response.residual
    (found,) = project(*streams, chosen, random=random, held=capture.positions)
    return replace(found, tokens=tuple(capture.tokens))
