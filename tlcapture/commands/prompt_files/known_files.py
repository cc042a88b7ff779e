"""Whether files of a capture set are there and what they hold, with one look at each that the index knows.

    files = KnownFiles(layout, "s", learn=run.report.learn)
    of_prompt = files.of("7")
    of_prompt.capture(overwrite=False)                  # KnownCapture, or None
    of_prompt.projection(trait, "residual")             # which vector it is onto, and when it was written

Files that the index does not know are read, checked and added to it. Folders are listed once, so that missing files
cost nothing: an object describes a set at one moment, and not a set that others are writing to.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import orjson

from tlcapture.captures.known_capture import KnownCapture
from tlcapture.commands.prompt_files.known_projections import (
    KnownProjection,
    facts_in_json,
    facts_of_shard,
    known_projection,
    known_shard,
)
from tlcapture.commands.prompt_files.known_views import PresentFile, facts_of_view, known_view
from tlcapture.errors import InputError, StorageError
from tlcapture.names import COMPACT, PromptId, Trait, file_name, is_safe_name
from tlcapture.runs.existing_files import OVERWRITE, REPLACE, saved_capture
from tlcapture.storage.compact.projection_shards import Shard, merged_shards
from tlcapture.storage.experiments.file_index import Facts, FileIndex, Learn, Learned
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.experiments.projection_places import STREAM_FOLDERS
from tlcapture.storage.files import FileState
from tlcapture.storage.folders import folders_in, names_in
from tlcapture.storage.regular_files import check_regular
from tlcapture.traits.vector_files import VectorFiles
from tlcapture.traits.vector_sources.packaged import vectors_layout
from tlcapture.traits.vectors import TraitVector

T = TypeVar("T")
Find = Callable[[Path], Facts | None]
_NOT_FACTS = (TypeError, ValueError, KeyError, IndexError, InputError)
# Of fewer prompts, or of a smaller share of the set, files are looked for one by one: a folder may hold many more.
_LISTED_FROM, _LISTED_SHARE = 200, 0.05
_ODD_NS = 2**62  # what is not a file counts as newer than any, so that it is looked at
ATTENTION, LENS = "_attention", "_logit_lens"


class KnownFiles:
    """The files of a capture set, as they are found now.

    Args:
        n_prompts: how many prompts' files will be asked for.
        learn: called with the facts about files that the index does not know, and with the states of the others.
    """

    def __init__(
        self,
        layout: Layout,
        capture_set: str,
        n_prompts: int,
        learn: Learn = lambda path, learned: None,
    ):
        self.layout = layout
        self.capture_set = capture_set
        self._learn = learn
        self._index = FileIndex(layout, capture_set)
        is_large_share = 0 < _LISTED_SHARE * self._index.n_prompts <= n_prompts
        self._lists = n_prompts >= _LISTED_FROM or is_large_share
        self._names: dict[Path, frozenset[str]] = {}
        self._odd: set[Path] = set()  # places that hold something other than a file
        self._shards: dict[Path, Mapping[str, Mapping[str, KnownProjection]]] = {}
        self._folders: dict[tuple[Trait, str], Path] = {}
        self._vectors: dict[Hashable, int] = {}
        self._prompts: dict[str, PromptFiles] = {}

    def of(self, name: PromptId, *, again: bool = False) -> PromptFiles:
        """The files of a capture, by its name; with `again`, the same object when it is asked for once more."""
        found = self._prompts.pop(str(name), None) or PromptFiles(self, name)
        if again:
            self._prompts[str(name)] = found
        return found

    @cached_property
    def raw(self) -> Path:
        """The folder of captures."""
        return self.layout.residual(self.capture_set, "x").parent

    @cached_property
    def internals(self) -> Path:
        """The folder of internals."""
        return self.layout.internals(self.capture_set, "x", 0).parent

    @cached_property
    def analysis(self) -> Path:
        """The folder of attention and logit lens."""
        return self.layout.attention(self.capture_set, "x").parent

    @cached_property
    def shards(self) -> Mapping[str, Path]:
        """The folder of shards, by component."""
        return {component: self.layout.shards(component, self.capture_set) for component in STREAM_FOLDERS}

    @cached_property
    def merged(self) -> Mapping[str, Sequence[Path]]:
        """The shards of several prompts, by component."""
        return {component: merged_shards(folder) for component, folder in self.shards.items()}

    @cached_property
    def projected(self) -> Sequence[tuple[Trait, str]]:
        """The traits and components that may have JSON files of the set."""
        inference = self.layout.folder / "inference"
        traits = [
            Trait(category, name)
            for category in filter(is_safe_name, folders_in(inference))
            for name in (folders_in(inference / category) if category != "raw" else ())
            if is_safe_name(name)
        ]
        pairs = ((trait, component) for trait in traits for component in STREAM_FOLDERS)
        return [pair for pair in pairs if self.projections(*pair).is_dir()]

    def projections(self, trait: Trait, component: str) -> Path:
        """The folder of JSON files of projections onto a trait."""
        key = trait, component
        if key not in self._folders:
            self._folders[key] = self.layout.projection(trait, component, self.capture_set, "x").parent
        return self._folders[key]

    def vector_ns(self, vector: TraitVector) -> int:
        """When the file of a vector was written, in nanoseconds since the epoch; 0 if it is not there."""
        key = (vector.experiment, vector.trait, vector.component, vector.method, vector.layer)
        if key not in self._vectors:
            files = VectorFiles(vectors_layout(self.layout.root, vector.experiment), vector.trait)
            path = files.file(vector.component, vector.method, vector.layer)
            self._vectors[key] = path.stat().st_mtime_ns if path.is_file() else 0
        return self._vectors[key]

    def state(self, path: Path) -> FileState | None:
        """The state of a file in one of these folders; `None` if there is no regular file."""
        if self._lists and path.name not in self._listed(path.parent):
            return None
        with suppress(OSError):
            found = os.lstat(path)
            self._odd.add(path)
            if stat.S_ISLNK(found.st_mode):
                found = os.stat(self.layout.own(path))
            if stat.S_ISREG(found.st_mode):
                self._odd.remove(path)
                return FileState.of(found)
        return None

    def is_odd(self, path: Path) -> bool:
        """Whether a path whose state was asked for is something other than a file: a folder, or a link to nothing."""
        return path in self._odd

    @cached_property
    def internals_of(self) -> Mapping[str, Sequence[Path]]:
        """The files of internals by the name of their capture."""
        found: dict[str, list[Path]] = {}
        for name in sorted(names_in(self.internals)):
            stem, layer = name.removesuffix(".pt").rpartition("_L")[::2]
            if name.endswith(".pt") and layer.isdigit():
                found.setdefault(stem, []).append(self.internals / name)
        return found

    def _listed(self, folder: Path) -> frozenset[str]:
        if folder not in self._names:
            self._names[folder] = names_in(folder)
        return self._names[folder]

    def found(self, path: Path, state: FileState, find: Find, parse: Callable[..., T]) -> T | None:
        """The facts about a file, known or found in it now, parsed by `parse`; `None` for a file without facts."""
        if (known := self._index.known(path, state)) is not None:
            with suppress(*_NOT_FACTS):
                found = parse(*known)
                self._learn(path, Learned(state, ()))  # that it is as it was
                return found
        if (facts := find(path)) is None:
            return None
        self._learn(path, Learned(state, facts))
        return parse(*map(orjson.loads, facts))

    def in_shard(self, path: Path) -> Mapping[str, Mapping[str, KnownProjection]]:
        """The projections in a shard, by prompt and trait; raises `StorageError` if it cannot be read."""
        if path not in self._shards:
            state, find = self.state(path), lambda each: facts_of_shard(Shard.open(each))
            if self.is_odd(path):
                check_regular(path)
            self._shards[path] = (self.found(path, state, find, known_shard) if state else None) or {}
        return self._shards[path]


class PromptFiles:
    """The files of a capture: each is looked at once."""

    def __init__(self, files: KnownFiles, name: PromptId):
        self.name = name
        self._files = files
        self._stem = file_name(name)
        self._states: dict[Path, FileState | None] = {}

    @property
    def raw(self) -> Path:
        """The path of the capture."""
        return self._files.raw / f"{self._stem}.pt"

    @property
    def captured_ns(self) -> int:
        """When the capture was written, in nanoseconds since the epoch; 0 if there is none."""
        state = self._state(self.raw)
        return 0 if state is None else state.mtime_ns

    @property
    def is_unfinished(self) -> bool:
        """Whether the run that wrote these files was cut off."""
        return self._state(self._files.raw / f".{self._stem}.unfinished") is not None

    def capture(self, *, overwrite: bool = False, advice: str = REPLACE) -> KnownCapture | None:
        """The facts about the capture; otherwise like `saved_capture`."""
        state = self._state(self.raw)
        opened: list[KnownCapture] = []

        def find(path: Path) -> Facts | None:
            capture = saved_capture(path, overwrite=overwrite, advice=advice)
            opened.extend([] if capture is None else [KnownCapture.of(capture)])
            return opened[0].facts() if opened else None

        found = self._files.found(self.raw, state, find, KnownCapture.from_facts) if state else None
        if self._files.is_odd(self.raw):
            find(self.raw)
        return found or (opened[0] if opened else None)

    def attention(self) -> PresentFile | None:
        """The file of attention, the newer one of two forms; `None` where there is none."""
        return self._view(ATTENTION)

    def logit_lens(self) -> PresentFile | None:
        """The file of the logit lens, as `attention`."""
        return self._view(LENS)

    def internals(self, layer: int) -> PresentFile | None:
        """The file of a layer's internals; `None` where there is none."""
        return self._present(self._files.internals / f"{self._stem}_L{layer}.pt")

    def add_ons(self) -> list[PresentFile]:
        """All files of attention, logit lens and internals."""
        paths = [*self._forms(ATTENTION), *self._forms(LENS), *self._files.internals_of.get(self._stem, ())]
        return [each for each in map(self._present, paths) if each is not None]

    def projection(self, trait: Trait, component: str, *, overwrite: bool = False) -> KnownProjection | None:
        """The projection onto a trait, the newer one of two forms; `None` where there is none.

        Raises `StorageError` for a file that cannot be read and may hold it; with `overwrite`, there is none then.
        """
        path = self._files.projections(trait, component) / f"{self._stem}.json"
        damaged = None
        try:
            in_json = self._in_json(path)
        except StorageError as error:
            if path.exists():
                check_regular(path)
            if not overwrite:
                raise StorageError(f"{error}: {OVERWRITE}") from None
            state = self._state(path)
            in_json = damaged = KnownProjection({}, 0 if state is None else state.mtime_ns)
        try:
            in_shard = self._in_shards(component).get(str(trait))
        except StorageError as error:
            if not overwrite:
                raise StorageError(f"{error}: {OVERWRITE}") from None
            return None
        if in_shard is None or (in_json is not None and in_json.written_ns >= in_shard.written_ns):
            return None if in_json is damaged else in_json
        return in_shard

    def made_from(self) -> KnownCapture | None:
        """The capture that all projections of the prompt were made from, as `CaptureRecord.find`."""
        try:
            found = {
                (trait, component): each
                for trait, component in self._files.projected
                if (each := self._in_json(self._files.projections(trait, component) / f"{self._stem}.json"))
            }
            for component in STREAM_FOLDERS:
                for name, each in self._in_shards(component).items():
                    key = Trait.parse(name), component
                    if key not in found or found[key].written_ns < each.written_ns:
                        found[key] = each
        except StorageError:
            return None
        captures = [each.capture for each in found.values()]
        first = captures[0] if captures else None
        if first is None or any(each is None or each.run != first.run for each in captures):
            return None
        return first if (first.capture_set, str(first.name)) == (self._files.capture_set, self._stem) else None

    def vector_ns(self, vector: TraitVector) -> int:
        """When the file of a vector was written; see `KnownFiles.vector_ns`."""
        return self._files.vector_ns(vector)

    def _in_json(self, path: Path) -> KnownProjection | None:
        state = self._state(path)
        if state is None:
            if self._files.is_odd(path):
                check_regular(path)
            return None
        return self._files.found(path, state, facts_in_json, partial(known_projection, state.mtime_ns))

    def _in_shards(self, component: str) -> Mapping[str, KnownProjection]:
        """The newest projection onto each trait in shards."""
        own = self._files.shards[component] / f"{self._stem}{COMPACT}"
        found: dict[str, KnownProjection] = {}
        for path in [*self._files.merged[component], *([own] if self._is_there(own) else [])]:
            for trait, each in self._files.in_shard(path).get(self._stem, {}).items():
                if trait not in found or found[trait].written_ns <= each.written_ns:
                    found[trait] = each
        return found

    def _forms(self, ending: str) -> list[Path]:
        return [self._files.analysis / f"{self._stem}{ending}{suffix}" for suffix in (".json", COMPACT)]

    def _view(self, ending: str) -> PresentFile | None:
        found = [
            (state.mtime_ns if (state := self._state(path)) else _ODD_NS, path)
            for path in self._forms(ending)
            if self._is_there(path)
        ]
        return self._present(max(found, key=lambda each: each[0])[1]) if found else None

    def _present(self, path: Path) -> PresentFile | None:
        if not self._is_there(path):
            return None
        state, view = self._state(path), None
        if state is None:
            return PresentFile(path, _ODD_NS, None)
        with suppress(StorageError):
            view = self._files.found(path, state, partial(facts_of_view, self._files.layout), known_view)
        return PresentFile(path, state.mtime_ns, view)

    def _is_there(self, path: Path) -> bool:
        """Whether anything is in a place, a file or not."""
        return self._state(path) is not None or self._files.is_odd(path)

    def _state(self, path: Path) -> FileState | None:
        if path not in self._states:
            self._states[path] = self._files.state(path)
        return self._states[path]
