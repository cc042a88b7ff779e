"""Writing a prompt's projections: as a JSON file for each trait, or as a shard for all of them.

The shards of a prompt set's prompts are put together at the end of a run: `merge_projections`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os.path import lexists
from pathlib import Path
from typing import Any

from tlcapture.commands.prompt_files.known_projections import facts_in_shard, facts_of_projection, facts_of_shard
from tlcapture.commands.prompt_files.view_files import WENT_COMPACT
from tlcapture.errors import StorageError
from tlcapture.names import PromptId, Trait, file_name
from tlcapture.runs.existing_files import OVERWRITE
from tlcapture.runs.prompt_shares import PromptShare
from tlcapture.runs.run import Run
from tlcapture.storage.compact.compact_files import PER_SCORE, is_written_compact
from tlcapture.storage.compact.projection_shards import Shard, merged_shards, shard_of_prompt, sharded_of
from tlcapture.storage.compact.shard_writing import merge_shards, take_out, write_prompt
from tlcapture.storage.files import remove, write_json
from tlcapture.storage.regular_files import check_regular
from tlcapture.traits.vectors import TraitVector
from tlcapture.views.hooks import COMPONENTS


@dataclass
class ProjectionFiles:
    """The projections of a prompt that are to be written, in the form that is asked for.

    The default is JSON, or a shard where JSON would be too large.
    """

    run: Run
    prompt_set: str
    prompt_id: PromptId
    form: str | None
    _contents: dict[str, dict[Trait, tuple[Path, Mapping[str, Any]]]] = field(default_factory=dict)  # by component
    _replaced: dict[str, list[str]] = field(default_factory=dict)  # traits in shards that are JSON now, by component
    _folders: dict[str, Path] = field(default_factory=dict)  # of shards, by component
    _sharded: dict[str, bool] = field(default_factory=dict)  # whether these folders exist

    def check_replaceable(self, *, overwrite: bool) -> None:
        """Raise `StorageError` for a shard that cannot be read and may hold the prompt; with `overwrite`, remove it."""
        for component in COMPONENTS:
            folder = self._folder(component)
            if not folder.is_dir():
                continue
            own = shard_of_prompt(folder, file_name(self.prompt_id))
            for path in [*merged_shards(folder), *([own] if lexists(own) else [])]:
                if path.exists():
                    check_regular(path)
                try:
                    Shard.open(path)
                except StorageError as error:
                    if not overwrite:
                        raise StorageError(f"{error}: {OVERWRITE}") from None
                    remove([path])

    def add(self, path: Path, vector: TraitVector, content: Mapping[str, Any]) -> None:
        """Add the content of a projection, whose JSON file is at `path`."""
        if not self._is_compact(content):
            self.run.wrote(write_json(path, content).knowing(facts_of_projection(content)))
            if self._has_shards(vector.component):
                self._replaced.setdefault(vector.component, []).append(str(vector.trait))
            return
        if self.form is None:
            self.run.warn(WENT_COMPACT)
        self._contents.setdefault(vector.component, {})[vector.trait] = path, content

    def write(self) -> None:
        """Write a shard of the added projections that belong in one, and remove what is replaced in the other form."""
        for component, traits in self._replaced.items():
            take_out(self._folder(component), file_name(self.prompt_id), traits)
        for component, by_trait in self._contents.items():
            contents = {str(trait): content for trait, (_, content) in by_trait.items()}
            folder, name, now = self._folder(component), file_name(self.prompt_id), time.time_ns()
            is_all = not sharded_of(folder, name)
            facts = facts_in_shard(name, contents, dict.fromkeys(contents, now)) if is_all else None
            self.run.wrote(write_prompt(folder, name, contents, now).knowing(facts))
            remove([path for path, _ in by_trait.values()])

    def _is_compact(self, content: Mapping[str, Any]) -> bool:
        n_layers, n_points = len(content["metadata"]["layers"]), len(content["metadata"]["sublayers"])
        n_tokens = sum(len(part) for part in content["projections"].values())
        return is_written_compact(self.form, n_tokens * n_layers * n_points * PER_SCORE)

    def _has_shards(self, component: str) -> bool:
        if component not in self._sharded:
            self._sharded[component] = self._folder(component).is_dir()
        return self._sharded[component]

    def _folder(self, component: str) -> Path:
        if component not in self._folders:
            self._folders[component] = self.run.layout.shards(component, self.prompt_set)
        return self._folders[component]


def merge_projections(run: Run, prompt_sets: Sequence[str], share: PromptShare | None) -> None:
    """Put the shards of single prompts of some sets together, unless other runs may be writing theirs now."""
    if share is not None:
        return
    for name in prompt_sets:
        for component in COMPONENTS:
            folder = run.layout.shards(component, name)
            for written in merge_shards(folder) if folder.is_dir() else ():
                run.wrote(written.knowing(facts_of_shard(Shard.open(written.path))))
