"""What the path of a projection file says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tlcapture.names import Trait

STREAM_FOLDERS = {"residual": "residual_stream", "attn_out": "attn_stream"}


@dataclass(frozen=True)
class ProjectionPlace:
    """What the path of a projection file says: its trait, component, prompt set, and the name of its prompt."""

    trait: Trait
    component: str
    prompt_set: str
    prompt_id: str


def place_of_projection(path: Path) -> ProjectionPlace | None:
    """What a path says of a projection file; `None` for one that is not the path of such a file in an experiment."""
    if path.suffix != ".json":
        return None
    parts = path.parts
    for component, stream in STREAM_FOLDERS.items():
        for at in (each for each, part in enumerate(parts) if part == stream):
            if at >= 3 and parts[at - 3] == "inference" and len(parts) > at + 2:
                trait = Trait(parts[at - 2], parts[at - 1])
                return ProjectionPlace(trait, component, "/".join(parts[at + 1 : -1]), path.stem)
    return None
