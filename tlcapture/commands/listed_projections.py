"""The projections of all prompts of a set, whose folders are listed once."""

from __future__ import annotations

from os import scandir
from pathlib import Path

from tlcapture.names import PromptId, Trait, file_name
from tlcapture.storage.layout import Layout
from tlcapture.storage.projection_places import STREAM_FOLDERS
from tlcapture.traits.saved_projections import SavedProjection, projections_saved


class ListedProjections:
    """The projections of a set's prompts of a component.

        ListedProjections(layout, "s", "residual").of(7)

    Where a set has shards, or links in place of files, its prompts are looked for one by one.

    Raises `StorageError` for a folder that cannot be listed.
    """

    def __init__(self, layout: Layout, prompt_set: str, component: str):
        self._layout, self._prompt_set, self._component = layout, prompt_set, component
        self._traits: list[tuple[Trait, Path, frozenset[str]]] = []
        self._is_listed = not any(layout.shards(each, prompt_set).exists() for each in STREAM_FOLDERS)
        stream = STREAM_FOLDERS[component]
        for folder in map(Path, layout.places_of_projections(prompt_set) if self._is_listed else ()):
            place = folder.relative_to(layout.folder / "inference").parts
            if place[2] == stream and folder.is_dir():
                with scandir(layout.own(folder)) as entries:
                    found = list(entries)
                self._is_listed &= not any(each.is_symlink() for each in found)
                names = frozenset(each.name for each in found)
                self._traits.append((Trait(place[0], place[1]), folder, names))
        self._traits.sort(key=lambda each: each[1])

    def of(self, prompt_id: PromptId) -> list[SavedProjection]:
        """A prompt's projections in the order of traits; raises `StorageError` like `projections_saved`."""
        if not self._is_listed:
            return projections_saved(self._layout, self._prompt_set, str(prompt_id), self._component)
        name = f"{file_name(prompt_id)}.json"
        return [
            SavedProjection(trait, self._component, folder / name)
            for trait, folder, names in self._traits
            if name in names
        ]
