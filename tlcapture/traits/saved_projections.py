"""The projection files of a prompt or of a prompt set. Loads no torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from tlcapture.errors import InputError
from tlcapture.names import Trait
from tlcapture.storage.layout import Layout
from tlcapture.traits.token_scores import TokenScores
from tlcapture.views.hooks import check_component


def saved_projections(
    layout: Layout, prompt_set: str, *, component: str = "residual", traits: Iterable[str] | str | None = None
) -> list[TokenScores]:
    """The projections in the files of a prompt set, in the order of its prompts and then of traits.

    Warns about captures without projections. Raises `InputError`, naming the command that projects, if no
    capture has a projection, or none onto a trait that is named.
    """
    check_component(component)
    ids = layout.prompt_ids(prompt_set)
    if not ids:
        available = ", ".join(layout.prompt_sets()) or "none"
        raise InputError(
            f"experiment {layout.experiment!r} has no captures of prompt set {prompt_set!r}; captured sets: "
            f"{available}; run 'tlcapture capture --experiment {layout.experiment} --prompt-set {prompt_set}'"
        )
    names = [traits] if isinstance(traits, str) else traits
    wanted = None if names is None else list(dict.fromkeys(Trait.parse(name) for name in names))
    by_prompt = {prompt_id: projections_of(layout, prompt_set, prompt_id, component, wanted) for prompt_id in ids}
    projections = [projection for found in by_prompt.values() for projection in found]
    without = [trait for trait in wanted or () if str(trait) not in {each.trait for each in projections}]
    if not projections or without:
        raise no_projections(layout, prompt_set, component, without)
    bare = [prompt_id for prompt_id, found in by_prompt.items() if not found]
    if bare:
        which = f"{len(bare)} of {len(ids)} captures of {prompt_set!r}"
        warnings.warn(f"{which} have no projection and are left out: {', '.join(bare)}", stacklevel=3)
    return projections


def projections_of(
    layout: Layout, prompt_set: str, prompt_id: str, component: str, traits: Sequence[Trait] | None = None
) -> list[TokenScores]:
    """A prompt's projections, in the order of traits; of all traits where none is named."""
    return [TokenScores.read(path) for path in projection_paths(layout, prompt_set, prompt_id, component, traits)]


def projection_paths(
    layout: Layout, prompt_set: str, prompt_id: str, component: str, traits: Sequence[Trait] | None = None
) -> list[Path]:
    """A prompt's projection files of a component, in the order of traits; of all traits where none is named."""
    wanted = []
    for path in layout.all_projections(prompt_set, prompt_id):
        trait, of_component = layout.of_projection(path)
        if of_component == component and (not traits or trait in traits):
            wanted.append(path)
    return wanted


def no_projections(layout: Layout, prompt_set: str, component: str, traits: Sequence[Trait] = ()) -> InputError:
    """The error for a prompt set without projections (onto some traits), with the command that projects."""
    onto = f" onto {', '.join(map(str, traits))}" if traits else ""
    options = f"--experiment {layout.experiment} --prompt-set {prompt_set}"
    options += "" if component == "residual" else f" --component {component}"
    options += f" --traits {','.join(map(str, traits))}" if traits else ""
    available = sorted({str(trait) for trait, found in layout.projection_folders(prompt_set) if found == component})
    return InputError(
        f"experiment {layout.experiment!r} has no {component} projections of prompt set {prompt_set!r}{onto}; "
        f"available traits: {', '.join(available) or 'none'}; run 'tlcapture project {options}'"
    )
