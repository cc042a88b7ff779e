"""Finding, reading and rewriting the projections of a prompt or of a prompt set, in JSON files or in shards.

`projection_files` checks the content of one, and `token_scores` holds it as arrays. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import scandir
from os.path import lexists
from pathlib import Path
from typing import Any

from tlcapture.errors import InputError, warn_user
from tlcapture.names import PromptId, Trait, file_name
from tlcapture.storage.compact.projection_shards import MERGED, ShardedProjection, merged_shards, sharded_of
from tlcapture.storage.experiments.command_lines import command_line
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.experiments.missing_captures import no_captures
from tlcapture.storage.experiments.projection_places import STREAM_FOLDERS
from tlcapture.storage.files import Written, read_json, write_json
from tlcapture.storage.regular_files import check_regular
from tlcapture.text import listed
from tlcapture.traits.projections.files import ProjectionFile
from tlcapture.traits.projections.token_scores import TokenScores
from tlcapture.views.hooks import COMPONENTS, check_component


def scores_of_set(
    layout: Layout, prompt_set: str, *, component: str = "residual", traits: Iterable[str] | str | None = None
) -> Iterator[TokenScores]:
    """The projections in the files of a prompt set, in the order of its prompts and then of traits, read one by one.

    In the end, warns about captures without projections, and raises `InputError`, naming the command that projects, if
    no capture has a projection, or none onto a trait that is named.
    """
    check_component(component)
    ids = layout.prompt_ids(prompt_set)
    if not ids:
        remedy = f"run '{command_line(layout, 'capture', '--prompt-set', prompt_set)}'"
        raise no_captures(layout, prompt_set, layout.prompt_sets(), remedy)
    names = [traits] if isinstance(traits, str) else traits
    named = None if names is None else list(dict.fromkeys(Trait.parse(name) for name in names))
    projected: set[str] = set()
    ids_without = []
    for prompt_id in ids:
        saved = projections_of_prompt(layout, prompt_set, prompt_id, component, named)
        if not saved:
            ids_without.append(prompt_id)
        for each in saved:
            scores = each.scores()
            projected.add(scores.trait)
            yield scores
    traits_without = [trait for trait in named or () if str(trait) not in projected]
    if not projected or traits_without:
        raise no_projections(layout, prompt_set, component, traits_without)
    if ids_without:
        which = f"{len(ids_without)} of {len(ids)} captures of {prompt_set!r}"
        warn_user(f"{which} have no projection and are left out: {listed(ids_without)}")


@dataclass(frozen=True)
class SavedProjection:
    """A prompt's projection onto a trait in a file.

    Attributes:
        json_path: the path that its JSON file has or would have.
        sharded: where it is in a shard; `None` for a JSON file.
    """

    trait: Trait
    component: str
    json_path: Path
    sharded: ShardedProjection | None = None

    @property
    def path(self) -> Path:
        """The file that holds it: its JSON file, or a shard."""
        return self.json_path if self.sharded is None else self.sharded.path

    @property
    def written_ns(self) -> int:
        """When it was written, in nanoseconds since the epoch."""
        if self.sharded is not None:
            return self.sharded.written_ns
        check_regular(self.json_path)
        return self.json_path.stat().st_mtime_ns

    def content(self, *, exact: bool = False) -> Any:
        """The content of the JSON file, unchecked; raises `StorageError` for a damaged one.

        Content that is to be rewritten must be `exact`, see `read_json`.
        """
        return read_json(self.json_path, exact=exact) if self.sharded is None else self.sharded.content()

    def labels(self) -> Any:
        """The content without its numbers, if they can be left out; raises like `content`."""
        return read_json(self.json_path) if self.sharded is None else self.sharded.content(scored=False)

    def read(self) -> ProjectionFile:
        """The content, checked; raises `StorageError` for a damaged file."""
        return ProjectionFile.parse(self.content(), self.path)

    def scores(self) -> TokenScores:
        """Tokens and scores; raises `StorageError` for a damaged file."""
        return TokenScores.of(self.read(), self.path, self.json_path)

    def write(self, content: Mapping[str, Any]) -> Written:
        """Write other content in the same form."""
        if self.sharded is None:
            return write_json(self.json_path, content)
        return write_sharded(self, {self.sharded.trait: content})


def write_sharded(saved: SavedProjection, contents: Mapping[str, Mapping[str, Any]]) -> Written:
    """Write contents by trait, all at once, to the prompt's own shard beside the one that holds a projection."""
    from tlcapture.storage.compact.shard_writing import write_prompt

    assert saved.sharded is not None
    folder = saved.path.parent.parent if saved.path.parent.name == MERGED else saved.path.parent
    return write_prompt(folder, saved.sharded.prompt_id, contents)


def all_saved(layout: Layout, prompt_set: str, prompt_id: str) -> list[SavedProjection]:
    """A prompt's projections of all components onto all traits, sorted; the newer one if both forms exist.

    Raises `StorageError` for a shard that cannot be read and may hold some of them.
    """
    found: dict[Path, SavedProjection] = {}
    for path in layout.all_projections(prompt_set, prompt_id):
        trait, component = layout.of_projection(path)
        found[path] = SavedProjection(trait, component, path)
    for component in COMPONENTS:
        for name, sharded in sharded_of(layout.shards(component, prompt_set), str(prompt_id)).items():
            trait = Trait.parse(name)
            path = layout.projection(trait, component, prompt_set, prompt_id)
            if path not in found or found[path].written_ns < sharded.written_ns:
                found[path] = SavedProjection(trait, component, path, sharded)
    return [found[path] for path in sorted(found)]


def saved_projection(
    layout: Layout, trait: Trait, component: str, prompt_set: str, prompt_id: PromptId
) -> SavedProjection | None:
    """A prompt's projection onto a trait; `None` if there is none. Raises `StorageError` like `all_saved`."""
    path = layout.projection(trait, component, prompt_set, prompt_id)
    sharded = sharded_of(layout.shards(component, prompt_set), str(prompt_id)).get(str(trait))
    of_json = SavedProjection(trait, component, path) if lexists(path) else None
    if sharded is None or (of_json is not None and of_json.written_ns >= sharded.written_ns):
        return of_json
    return SavedProjection(trait, component, path, sharded)


def projections_of_prompt(
    layout: Layout, prompt_set: str, prompt_id: str, component: str, traits: Sequence[Trait] | None = None
) -> list[SavedProjection]:
    """A prompt's projections of a component, in the order of traits; of all traits if none is named."""
    if traits:
        named = (saved_projection(layout, trait, component, prompt_set, prompt_id) for trait in sorted(set(traits)))
        return [each for each in named if each is not None]
    return [each for each in all_saved(layout, prompt_set, prompt_id) if each.component == component]


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
            category, name, stream_folder, *_ = folder.relative_to(layout.folder / "inference").parts
            if stream_folder == stream and folder.is_dir():
                with scandir(layout.own(folder)) as entries:
                    found = list(entries)
                self._is_listed &= not any(each.is_symlink() for each in found)
                names = frozenset(each.name for each in found)
                self._traits.append((Trait(category, name), folder, names))
        self._traits.sort(key=lambda each: each[1])

    def of(self, prompt_id: PromptId) -> list[SavedProjection]:
        """A prompt's projections in the order of traits; raises `StorageError` like `projections_of_prompt`."""
        if not self._is_listed:
            return projections_of_prompt(self._layout, self._prompt_set, str(prompt_id), self._component)
        name = f"{file_name(prompt_id)}.json"
        return [
            SavedProjection(trait, self._component, folder / name)
            for trait, folder, names in self._traits
            if name in names
        ]


def merged_files(layout: Layout, prompt_set: str) -> list[Path]:
    """The shards that hold projections of several prompts of a set."""
    return [path for component in COMPONENTS for path in merged_shards(layout.shards(component, prompt_set))]


def remove_sharded(layout: Layout, prompt_set: str, prompt_id: PromptId) -> list[Path]:
    """Remove a prompt's projections from all shards of its set; returns the files that are gone."""
    from tlcapture.storage.compact.shard_writing import take_out

    folders = [layout.shards(component, prompt_set) for component in COMPONENTS]
    return [path for folder in folders if folder.is_dir() for path in take_out(folder, str(prompt_id))]


def no_projections(layout: Layout, prompt_set: str, component: str, traits: Sequence[Trait] = ()) -> InputError:
    """The error for a prompt set without projections (onto some traits), with the command that projects."""
    onto = f" onto {', '.join(map(str, traits))}" if traits else ""
    options = ["--prompt-set", prompt_set]
    options += [] if component == "residual" else ["--component", component]
    options += ["--traits", ",".join(map(str, traits))] if traits else []
    available = sorted({str(trait) for trait, found in layout.projection_folders(prompt_set) if found == component})
    return InputError(
        f"experiment {layout.experiment!r} has no {component} projections of prompt set {prompt_set!r}{onto}; "
        f"available traits: {listed(available)}; run '{command_line(layout, 'project', *options)}'"
    )
