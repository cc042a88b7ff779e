"""The paths of all files: the only module that knows the folders of an experiment.

    root/experiments/{experiment}/config.json
                                  extraction/{category}/{trait}/vectors/
                                  inference/raw/residual|internals/{prompt_set}/
                                  inference/{category}/{trait}/residual_stream|attn_stream/{prompt_set}/
                                  analysis/per_token/{prompt_set}/
                                  analysis/compare/{other}/{prompt_set}/
                                  analysis/projections/residual_stream|attn_stream/{prompt_set}/
                                  steering/{category}/{trait}/
                                  runs/{time}-{command}-{process}.json, notes/{prompt_set}/

Below `inference/` and `analysis/`, a variant of a prompt set has the folder `{prompt_set}@{variant}` beside it. Files
of a capture begin with its name: the id of its prompt, or `7.s1` for sample 1 of prompt 7. Where a method takes a
prompt's id, the name of a sample is one.

The folders of prompt sets and trait examples are found by `storage/experiments/datasets`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from os.path import islink, join, lexists, realpath, sep, split
from pathlib import Path

from tlcapture.errors import InputError, StorageError
from tlcapture.names import (
    COMPACT,
    PromptId,
    Trait,
    check_capture_set,
    check_name,
    file_name,
    is_capture_set,
    is_safe_name,
)
from tlcapture.storage.experiments.projection_places import STREAM_FOLDERS, place_of_projection
from tlcapture.storage.folders import folders_in, holds_any, natural, stems_in, subfolders, while_unchanged
from tlcapture.storage.regular_files import check_open, is_folder
from tlcapture.storage.remote.roots import check_complete, list_experiment, refresh
from tlcapture.text import beside


def existing_experiments(root: Path) -> list[str]:
    """The experiments in a root, sorted, and links to folders that are gone; raises `StorageError` if unreadable."""
    return sorted(name for name in folders_in(root / "experiments", lost=True) if not name.startswith("."))


@dataclass(frozen=True)
class Layout:
    """The paths of an experiment in a root. Creates no folders; lists folders, and reads only indices of shards.

    Methods that take a name from outside (prompt set, prompt id) raise `InputError` if it is not a safe file name. All
    paths are checked by `own`: a link that leads out of the experiment raises `StorageError`.
    """

    root: Path
    experiment: str
    _known: _KnownToRun | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_name(self.experiment, "experiment")
        list_experiment(self.root, self.experiment)

    def for_run(self) -> Layout:
        """The same layout for a run, which holds the locks of what it writes.

        It lists a folder of internals once, and afterwards knows what layers there are from the paths that it gave.
        It looks for links on the way to a folder once.
        """
        return self if self._known is not None else replace(self, _known=_KnownToRun())

    @cached_property
    def folder(self) -> Path:
        """The experiment's folder."""
        return self.root / "experiments" / self.experiment

    def check_exists(self) -> None:
        """Raise `InputError` if this experiment does not exist, or is not all there; `StorageError` if it is closed."""
        check_complete(self.folder)
        if not is_folder(self.folder):
            others = beside(self.experiment, existing_experiments(self.root), "existing experiments")
            raise InputError(f"no experiment {self.experiment!r}: expected the folder {self.folder}{others}")
        check_open(self.folder)

    def own(self, path: Path) -> Path:
        """Return a path below the experiment's folder, or raise `StorageError` if it contains a link that leads out.

        The folder itself, `experiments/` and the root may be links, for example to another disk.
        """
        if (link := self._leads_out(path)) is not None:
            raise StorageError(f"{link}: a link that leads out of the experiment {self.folder} is not followed")
        return path

    def _leads_out(self, path: Path) -> Path | None:
        """The first link below the experiment's folder, on the way to `path`, that leads out of it."""
        below, folder = str(self.folder), split(path)[0]
        parts = str(path)[len(below) + 1 :].split(sep)
        if self._known is not None and folder in self._known.own_folders:
            below, parts = folder, parts[-1:]
        for part in parts:
            below = f"{below}{sep}{part}"
            # Only links are resolved, since that is slow. A link to itself resolves to itself, within the experiment.
            if islink(below) and not Path(realpath(below)).is_relative_to(realpath(self.folder)):
                return Path(below)
        if self._known is not None:
            self._known.own_folders.add(folder)
        return None

    def _listed(self, pattern: str) -> list[Path]:
        """Folders below the experiment's that match a path of names and `*`, sorted; none behind links that lead out.

        Raises `StorageError` for one that cannot be read, or is not a folder.
        """
        found = [self.folder]
        for name in pattern.split("/"):
            found = [each / part for each in found for part in (folders_in(each) if name == "*" else [name])]
        return sorted(path for path in found if self._leads_out(path) is None and is_folder(path))

    @property
    def config(self) -> Path:
        """The experiment's `config.json`."""
        return self.own(self.folder / "config.json")

    def lock(self, name: str) -> Path:
        """The lock file `name` for work that two runs must not do at the same time in this experiment."""
        return self.own(self.folder / ".locks" / f"{name.replace('/', '+')}.lock")

    def share_lock(self, name: str, share: str) -> Path:
        """The lock file for a share of what `lock(name)` is for."""
        return self.lock(name).with_suffix(".shards") / f"{share}.lock"

    def share_locks(self, name: str) -> list[Path]:
        """The lock files of all shares that were ever written, sorted."""
        folder = refresh(self.lock(name).with_suffix(".shards"))
        return [folder / f"{share}.lock" for share in sorted(stems_in(folder, ".lock"))]

    def run_record(self, name: str) -> Path:
        """The record of a run."""
        return self.own(self.folder / "runs" / f"{name}.json")

    # -- captures ---------------------------------------------------------------------------------

    def residual(self, prompt_set: str, prompt_id: PromptId) -> Path:
        """The raw residual file of a prompt, its capture."""
        return self.own(self._raw("residual", prompt_set) / f"{file_name(prompt_id)}.pt")

    def unfinished(self, prompt_set: str, prompt_id: PromptId) -> Path:
        """The marker file of a prompt whose files are being written, or were being written by a run that was killed."""
        return self.own(self._raw("residual", prompt_set) / f".{file_name(prompt_id)}.unfinished")

    def internals(self, prompt_set: str, prompt_id: PromptId, layer: int) -> Path:
        """The internals file of a prompt and layer."""
        path = self.own(self._raw("internals", prompt_set) / f"{file_name(prompt_id)}_L{layer}.pt")
        if self._known is not None:
            self._known.layers_in(path.parent).add(str(layer))
        return path

    def all_internals(self, prompt_set: str, prompt_id: PromptId) -> list[Path]:
        """The existing internals files of a prompt, of all layers."""
        folder = self.own(self._raw("internals", prompt_set))
        layers = _layers_in(folder) if self._known is None else self._known.layers_in(folder)
        paths = (folder / f"{file_name(prompt_id)}_L{layer}.pt" for layer in sorted(layers))
        return [self.own(path) for path in paths if lexists(path)]

    def attention(self, prompt_set: str, prompt_id: PromptId) -> Path:
        """The attention file of a prompt in JSON; `saved` has the form that exists."""
        return self.own(self._analysis(prompt_set) / f"{file_name(prompt_id)}_attention.json")

    def logit_lens(self, prompt_set: str, prompt_id: PromptId) -> Path:
        """The logit-lens file of a prompt in JSON; `saved` has the form that exists."""
        return self.own(self._analysis(prompt_set) / f"{file_name(prompt_id)}_logit_lens.json")

    def forms(self, path: Path) -> list[Path]:
        """The paths of an analysis file in both of its forms: JSON, and compact."""
        return [path, self.own(path.with_suffix(COMPACT))]

    def saved(self, path: Path) -> Path:
        """The existing form of an analysis file, the newer one of two; the JSON path if there is none."""
        found = [each for each in self.forms(path) if lexists(each)]
        return max(found, key=lambda each: each.lstat().st_mtime_ns) if found else path

    def written_folders(self, prompt_sets: Iterable[str]) -> Iterator[Path]:
        """The existing folders below this one that commands on prompt sets write to, without links that lead out."""
        for folder in (self.folder / each for each in folders_in(self.folder) if each not in ("inference", "analysis")):
            yield from (folder, *(path for _, path in subfolders(folder)))
        patterns = ("inference/raw/*", "analysis/*", "analysis/compare/*")
        parents = [path for pattern in patterns for path in self._listed(pattern)]
        parents += [*map(self._of_shards, STREAM_FOLDERS), *(stream for _, _, stream in self._streams())]
        for folder in (parent / check_capture_set(name) for name in prompt_sets for parent in parents):
            yield from (each for each in (folder, folder / "+") if each.is_dir() and self._leads_out(each) is None)

    def captured_prompt_sets(self) -> list[str]:
        """The prompt sets with at least one capture, sorted."""
        found = self._prompt_set_folders(self.folder / "inference" / "raw" / "residual")
        return sorted(name for name, folder in found if holds_any(folder, ".pt", is_safe_name))

    def has_captures(self, prompt_set: str) -> bool:
        """Whether a prompt set has at least one capture."""
        return holds_any(self.own(self._raw("residual", prompt_set)), ".pt", is_safe_name)

    def captured(self, prompt_set: str) -> list[str]:
        """The ids of captured prompts of a set: numbers in numerical order, then names."""
        return sorted(filter(is_safe_name, stems_in(self.own(self._raw("residual", prompt_set)), ".pt")), key=natural)

    def prompt_ids(self, prompt_set: str) -> list[str]:
        """The ids of prompts with a capture or projections: numbers in numerical order, then names."""
        from tlcapture.storage.compact.projection_shards import sharded_prompts

        projected = {name for _, folder in self._projected(prompt_set) for name in stems_in(folder, ".json")}
        projected |= {each for _, folder in self._folders_of_shards(prompt_set) for each in sharded_prompts(folder)}
        return sorted({*self.captured(prompt_set), *filter(is_safe_name, projected)}, key=natural)

    def has_prompt(self, prompt_set: str, prompt_id: PromptId) -> bool:
        """Whether a prompt has a capture or projections; looks for its own files alone."""
        from tlcapture.storage.compact.projection_shards import is_sharded

        if lexists(self.residual(prompt_set, prompt_id)) or self.all_projections(prompt_set, prompt_id):
            return True
        folders = (self.shards(component, prompt_set) for component in STREAM_FOLDERS)
        return any(is_sharded(folder, file_name(prompt_id)) for folder in folders)

    def prompt_sets(self) -> list[str]:
        """The prompt sets with a capture or projections, sorted."""
        sharded = (name for component in STREAM_FOLDERS for name in self._sharded_sets(component))
        return sorted({*self.captured_prompt_sets(), *(name for name, _ in self._projected()), *sharded})

    def _prompt_set_folders(self, folder: Path) -> Iterator[tuple[str, Path]]:
        """The folders below a folder that may hold files of a prompt set, by its name, without links that lead out."""
        for name, path in subfolders(folder):
            if is_capture_set(name[:-1]) and self._leads_out(path) is None:
                yield name[:-1], path

    def _streams(self) -> Iterator[tuple[Trait, str, Path]]:
        """Trait, component and folder of all projections, of all prompt sets."""
        for component, stream in STREAM_FOLDERS.items():
            for path in self._listed(f"inference/*/*/{stream}"):
                category, name = path.parents[1].name, path.parent.name
                if is_safe_name(category) and is_safe_name(name) and category != "raw":
                    yield Trait(category, name), component, path

    def _projected(self, prompt_set: str | None = None) -> Iterator[tuple[str, Path]]:
        """The folders with projections of a prompt set, or of all sets, for all traits and components, by set."""
        for _, _, stream in self._streams():
            yield from self._with_projections(stream, prompt_set)

    def _with_projections(self, stream: Path, prompt_set: str | None) -> Iterator[tuple[str, Path]]:
        if prompt_set is None:
            found = self._prompt_set_folders(stream)
        else:
            folder = stream / check_capture_set(prompt_set)
            found = iter([(prompt_set, folder)] if self._leads_out(folder) is None else [])
        yield from ((name, folder) for name, folder in found if holds_any(folder, ".json"))

    # -- traits -----------------------------------------------------------------------------------

    def vectors(self, trait: Trait) -> Path:
        """The folder of a trait's vectors."""
        return self.own(self.folder / "extraction" / trait.category / trait.name / "vectors")

    def traits(self) -> list[Trait]:
        """The traits with a folder of vectors, sorted."""
        names = ((path.parent.parent.name, path.parent.name) for path in self._listed("extraction/*/*/vectors"))
        return sorted(Trait(*pair) for pair in names if all(map(is_safe_name, pair)))

    def example_activations(self, trait: Trait, component: str) -> Path:
        """The file of the activations that a trait's vectors were fitted on."""
        return self.own(self.vectors(trait).parent / "activations" / f"{component}.pt")

    @property
    def evaluation(self) -> Path:
        """The evaluation file of the experiment's vectors."""
        return self.own(self.folder / "extraction" / "extraction_evaluation.json")

    def reference(self, component: str) -> Path:
        """The file with a component's mean activations on the packaged prompts, next to the vectors."""
        name = "reference.pt" if component == "residual" else f"{component}_reference.pt"
        return self.own(self.folder / "extraction" / name)

    def steering(self, trait: Trait) -> Path:
        """The steering results of a trait."""
        return self.own(self.folder / "steering" / trait.category / trait.name / "results.json")

    def projection(self, trait: Trait, component: str, prompt_set: str, prompt_id: PromptId) -> Path:
        """The projection file of a prompt onto a trait's vector; `component` is `residual` or `attn_out`."""
        folder = self.folder / "inference" / trait.category / trait.name / STREAM_FOLDERS[component]
        return self.own(folder / check_capture_set(prompt_set) / f"{file_name(prompt_id)}.json")

    def all_projections(self, prompt_set: str, prompt_id: PromptId) -> list[Path]:
        """The existing projection files of a prompt, for all traits and components, sorted."""
        name = f"{file_name(prompt_id)}.json"
        places = (f"{folder}{sep}{name}" for folder in self.places_of_projections(prompt_set))
        return sorted(self.own(Path(place)) for place in places if lexists(place))

    def places_of_projections(self, prompt_set: str) -> Iterator[str]:
        """The folders that may hold projection files of a prompt set, for all traits and components."""
        check_capture_set(prompt_set)
        inference = join(self.folder, "inference")
        for category in folders_in(inference):
            for trait in folders_in(join(inference, category)) if category != "raw" else ():
                folder = join(inference, category, trait)
                yield from (f"{folder}{sep}{stream}{sep}{prompt_set}" for stream in STREAM_FOLDERS.values())

    def projection_folders(self, prompt_set: str | None = None) -> list[tuple[Trait, str]]:
        """The traits and components that prompts of a set, or of any set, are projected onto, sorted."""
        from tlcapture.storage.compact.projection_shards import traits_in_shards

        found = {
            (trait, component)
            for trait, component, stream in self._streams()
            if any(self._with_projections(stream, prompt_set))
        }
        for component, folder in self._folders_of_shards(prompt_set):
            found |= {(Trait.parse(name), component) for name in traits_in_shards(folder)}
        return sorted(found)

    def shards(self, component: str, prompt_set: str) -> Path:
        """The folder of a prompt set's projections in the compact form."""
        return self.own(self._of_shards(component) / check_capture_set(prompt_set))

    def _of_shards(self, component: str) -> Path:
        return self.folder / "analysis" / "projections" / STREAM_FOLDERS[component]

    def _sharded_sets(self, component: str) -> Iterator[str]:
        """The prompt sets with projections in the compact form."""
        for name, path in self._prompt_set_folders(self._of_shards(component)):
            if holds_any(path, COMPACT) or holds_any(path / "+", COMPACT):
                yield name

    def _folders_of_shards(self, prompt_set: str | None = None) -> Iterator[tuple[str, Path]]:
        """Component and folder of the projections in the compact form, of a prompt set or of all."""
        for component in STREAM_FOLDERS:
            for name in self._sharded_sets(component) if prompt_set is None else [prompt_set]:
                yield component, self.shards(component, name)

    def of_projection(self, path: Path) -> tuple[Trait, str]:
        """Trait and component of a projection file, from its path."""
        place = place_of_projection(path.relative_to(self.folder))
        assert place is not None
        return place.trait, place.component

    def of_residual(self, path: Path) -> tuple[str, str]:
        """Prompt set and id of a raw residual file, from its path."""
        place = path.relative_to(self.folder / "inference" / "raw" / "residual")
        return place.parent.as_posix(), place.stem

    def picture(self, trait: Trait, kind: str) -> Path:
        """The PNG file of a trait; `kind` is `evaluation` or `steering`."""
        file = self.vectors(trait) if kind == "evaluation" else self.steering(trait)
        return self.own(file.parent / f"{kind}.png")

    def _raw(self, kind: str, prompt_set: str) -> Path:
        return self.folder / "inference" / "raw" / kind / check_capture_set(prompt_set)

    def _analysis(self, prompt_set: str) -> Path:
        return self.folder / "analysis" / "per_token" / check_capture_set(prompt_set)


@dataclass
class _KnownToRun:
    """What a run knows about folders to which no other run writes."""

    own_folders: set[str] = field(default_factory=set)  # no link on the way to them leads out of the experiment
    layers: dict[Path, set[str]] = field(default_factory=dict)  # of internals: those found, and those asked for

    def layers_in(self, folder: Path) -> set[str]:
        """The layers, as text, of the internals in a folder."""
        if folder not in self.layers:
            self.layers[folder] = set(_layers_in(folder))
        return self.layers[folder]


@while_unchanged(16)
def _layers_in(folder: Path) -> frozenset[str]:
    """The layers, as text, that any file of internals in a folder is of."""
    ends = (stem.rpartition("_L") for stem in stems_in(folder, ".pt"))
    return frozenset(layer for stem, _, layer in ends if stem and layer.isdecimal())


def derived_files(layout: Layout, prompt_set: str, prompt_id: PromptId) -> list[Path]:
    """The existing files made from a raw residual, or whatever is at their paths, without shards of several prompts.

    Comparisons that another experiment holds of it are not among them.
    """
    compare = layout.folder / "analysis" / "compare"
    others = compare.iterdir() if is_folder(compare) else ()
    files = [*layout.forms(layout.attention(prompt_set, prompt_id))]
    files += layout.forms(layout.logit_lens(prompt_set, prompt_id))
    files += layout.all_internals(prompt_set, prompt_id) + layout.all_projections(prompt_set, prompt_id)
    files += [layout.shards(component, prompt_set) / f"{file_name(prompt_id)}{COMPACT}" for component in STREAM_FOLDERS]
    files += [layout.own(other / prompt_set / f"{file_name(prompt_id)}.json") for other in sorted(others)]
    return [path for path in files if lexists(path)]
