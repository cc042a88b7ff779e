"""PNG files of each prompt's trajectory and layers, drawn from projection files. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tlcapture.commands.plots import projection_picture
from tlcapture.errors import StorageError
from tlcapture.names import Trait
from tlcapture.runs.display import Display
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.files import write_bytes
from tlcapture.traits.projections.saved import SavedProjection, no_projections, projections_of_prompt
from tlcapture.views.hooks import check_component

_LONGEST_NAME = 200  # of the 255 bytes that file systems allow; a name is longer while it is written


def write_pictures(
    layout: Layout,
    prompt_set: str,
    prompt_ids: Iterable[str],
    folder: Path,
    component: str = "residual",
    traits: Sequence[Trait] = (),
    display: Display = Display(),
) -> list[Path]:
    """Write a picture for each prompt and trait (all traits where none is named); returns the files.

    They lie below `folder` as projections do below the experiment's `inference/`, and their names say what they show:
    `{category}/{trait}/residual_stream/{prompt_set}/{experiment}_{category}_{trait}_{prompt_set}_{id}.png`. Prompts
    without projections are left out.

    Raises:
        InputError: none of the prompts has a projection; the message names the command that projects.
        StorageError: a projection file is damaged (all others are drawn), or a picture cannot be written.
    """
    check_component(component)
    files = [
        each
        for prompt_id in prompt_ids
        for each in projections_of_prompt(layout, prompt_set, prompt_id, component, traits)
    ]
    if not files:
        raise no_projections(layout, prompt_set, component, traits)
    written: list[Path] = []
    failures: list[str] = []
    with display.progress(len(files), f"{prompt_set} pictures", "picture") as progress:
        for file in files:
            progress.advance(1)
            try:
                scores = file.scores()
            except StorageError as error:
                failures.append(str(error))
                continue
            picture = folder / _place(layout, file, prompt_set)
            write_bytes(picture, projection_picture(scores))
            written.append(picture)
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise StorageError(f"{len(written)} of {len(files)} pictures of {prompt_set} were drawn: {failures[0]}{more}")
    return written


def _place(layout: Layout, file: SavedProjection, prompt_set: str) -> Path:
    """Where a picture lies; one whose name would be too long for a file system is called by its prompt alone."""
    below = file.json_path.relative_to(layout.folder / "inference")
    component = "" if file.component == "residual" else f"_{file.component}"
    shown = f"{file.trait.category}_{file.trait.name}{component}_{prompt_set.replace('/', '_')}_{below.stem}"
    name = f"{layout.experiment}_{shown}"
    return below.with_name(f"{name if len(name) <= _LONGEST_NAME else below.stem}.png")
