"""Reading trait, component, prompt set and prompt from the path of a projection file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tlcapture.names import Trait

STREAM_FOLDERS = {"residual": "residual_stream", "attn_out": "attn_stream"}


@dataclass(frozen=True)
class ProjectionPlace:
    """The place of a projection file: its experiment's folder, trait, component, prompt set, and its prompt's name."""

    folder: Path
    trait: Trait
    component: str
    prompt_set: str
    prompt_id: str


def place_of_projection(path: Path) -> ProjectionPlace | None:
    """The place that a path names; `None` if it is not the path of a projection file in an experiment."""
    if path.suffix != ".json":
        return None
    parts = path.parts
    for component, stream in STREAM_FOLDERS.items():
        for at in (each for each, part in enumerate(parts) if part == stream):
            if at >= 3 and parts[at - 3] == "inference" and len(parts) > at + 2:
                trait = Trait(parts[at - 2], parts[at - 1])
                folder = Path(*parts[: at - 3])
                return ProjectionPlace(folder, trait, component, "/".join(parts[at + 1 : -1]), path.stem)
    return None
