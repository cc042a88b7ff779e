"""Which prompts of a set had files made from a capture when a run began."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tlcapture.names import COMPACT, PromptId, file_name
from tlcapture.storage.compact.projection_shards import MERGED
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.experiments.projection_places import STREAM_FOLDERS
from tlcapture.storage.folders import folders_in, stems_in

_VIEWS = tuple(f"{view}{suffix}" for view in ("_attention", "_logit_lens") for suffix in (".json", COMPACT))


class PromptsWithFiles:
    """The prompts of a set that had any derived file when a run began, which holds the lock of the set's captures.

        before = PromptsWithFiles(layout, "s")
        before.may_have_any(7)

    Files of other prompts need not be looked for in each place where one may be.
    """

    def __init__(self, layout: Layout, prompt_set: str):
        self._has_merged = False
        self._names = {name.casefold() for name in self._listed(layout, prompt_set)}

    def may_have_any(self, prompt_id: PromptId) -> bool:
        """Whether a prompt may have a derived file, or a part of a shard of several prompts."""
        return self._has_merged or file_name(prompt_id).casefold() in self._names

    def _listed(self, layout: Layout, prompt_set: str) -> Iterator[str]:
        views = layout.attention(prompt_set, "x").parent
        yield from (stem for ending in _VIEWS for stem in stems_in(views, ending))
        internals = layout.internals(prompt_set, "x", 0).parent
        yield from (stem.rpartition("_L")[0] for stem in stems_in(internals, ".pt"))
        for folder in layout.places_of_projections(prompt_set):
            yield from stems_in(Path(folder), ".json")
        for component in STREAM_FOLDERS:
            shards = layout.shards(component, prompt_set)
            yield from stems_in(shards, COMPACT)
            self._has_merged |= bool(stems_in(shards / MERGED, COMPACT))
        compare = layout.folder / "analysis" / "compare"
        for other in folders_in(compare):
            yield from stems_in(layout.own(compare / other / prompt_set), ".json")
