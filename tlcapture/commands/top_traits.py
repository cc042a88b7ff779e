"""The summary of a projected prompt set: for each prompt, the trait that rose most and where it committed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev

from tlcapture.errors import StorageError
from tlcapture.storage.layout import Layout
from tlcapture.traits.projection_files import ProjectionFile
from tlcapture.traits.saved_projections import projection_paths

FEWEST_TO_COMPARE = 3


@dataclass(frozen=True)
class TopTrait:
    """The trait that rose most in a prompt's response.

    `rise` starts as the mean of the trajectory over the response minus its mean over the prompt (without the first
    token, an attention sink). It is standardised over the prompt set, and so measures how far the prompt stands
    out. For a set of fewer than three prompts it is in standard deviations of the trajectory instead.
    """

    prompt_id: str
    trait: str
    rise: float
    commitment_point: int | None
    token: str | None
    response: str


def top_traits(layout: Layout, prompt_set: str, component: str = "residual") -> list[TopTrait]:
    """The trait that rose most in each prompt of a set that has projections."""
    by_trait: dict[str, dict[str, ProjectionFile]] = {}
    for prompt_id in layout.prompt_ids(prompt_set):
        for path in projection_paths(layout, prompt_set, prompt_id, component):
            if content := _read(path):
                trait, _ = layout.of_projection(path)
                by_trait.setdefault(str(trait), {})[prompt_id] = content
    rises = {trait: _rises(contents) for trait, contents in by_trait.items()}
    tops = []
    for prompt_id in layout.prompt_ids(prompt_set):
        candidates = {trait: values[prompt_id] for trait, values in rises.items() if prompt_id in values}
        if candidates:
            top = max(candidates, key=lambda name: candidates[name])
            tops.append(_top(prompt_id, top, candidates[top], by_trait[top][prompt_id]))
    return tops


def _read(path: Path) -> ProjectionFile | None:
    """A projection file; `None` for a damaged one, which the run has reported, and for one without dynamics."""
    try:
        content = ProjectionFile.read(path)
    except StorageError:
        return None
    return content if content.dynamics is not None else None


def _rises(contents: dict[str, ProjectionFile]) -> dict[str, float]:
    raw, spread = {}, {}
    for prompt_id, content in contents.items():
        prompt, response = content.trajectory
        before = prompt[1:]
        if before and response:
            raw[prompt_id] = mean(response) - mean(before)
            spread[prompt_id] = pstdev([*before, *response])
    if len(raw) < FEWEST_TO_COMPARE:
        return {prompt_id: rise / (spread[prompt_id] or 1.0) for prompt_id, rise in raw.items()}
    centre, scale = mean(raw.values()), pstdev(raw.values()) or 1.0
    return {prompt_id: (rise - centre) / scale for prompt_id, rise in raw.items()}


def _top(prompt_id: str, trait: str, rise: float, content: ProjectionFile) -> TopTrait:
    point = content.dynamics.commitment_point if content.dynamics else None
    token = None if point is None else content.tokens[point]
    return TopTrait(prompt_id, trait, rise, point, token, content.response.text)
