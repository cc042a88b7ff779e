"""The paths of all files: the only module that knows the folders of a root and of an experiment.

    root/datasets/inference/{prompt_set}.json
    root/datasets/traits/{category}/{trait}/
    root/experiments/{experiment}/config.json
                                  extraction/{category}/{trait}/vectors/
                                  inference/raw/residual|internals/{prompt_set}/
                                  inference/{category}/{trait}/residual_stream|attn_stream/{prompt_set}/
                                  analysis/per_token/{prompt_set}/
                                  steering/{category}/{trait}/
                                  runs/{time}-{command}-{process}.json

Prompt sets and trait examples that a root's `datasets/` does not have are looked up in the installed package.
"""

from __future__ import annotations

from dataclasses import dataclass
from os.path import islink, join, realpath
from pathlib import Path

from tlcapture.errors import InputError, StorageError
from tlcapture.names import Trait, check_name, is_safe_name

STREAM_FOLDERS = {"residual": "residual_stream", "attn_out": "attn_stream"}


def shipped_datasets() -> Path:
    """The `datasets/` folder of the package: inside the package if installed from a wheel, next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "datasets"
    return inside if inside.is_dir() else package.parent / "datasets"


@dataclass(frozen=True)
class Datasets:
    """The prompt sets and trait examples of a root, and those of the package, which it takes second."""

    root: Path

    @property
    def folders(self) -> list[Path]:
        """The folders to search, in their order."""
        return [self.root / "datasets", shipped_datasets()]

    def prompt_sets(self) -> list[str]:
        """The names of all prompt sets, sorted."""
        found = {path.stem for folder in self.folders for path in folder.glob("inference/*.json")}
        return sorted(filter(is_safe_name, found))

    def prompt_set_file(self, name: str) -> Path:
        """The file of a prompt set, preferably in the root; raises `InputError` if there is none."""
        check_name(name, "prompt set")
        for folder in self.folders:
            path = folder / "inference" / f"{name}.json"
            if path.is_file():
                return path
        existing = ", ".join(self.prompt_sets()) or "none"
        raise InputError(
            f"no prompt set {name!r}: looked for {self.folders[0] / 'inference' / (name + '.json')} "
            f"and in the package; existing sets: {existing}"
        )

    def traits(self) -> list[Trait]:
        """All traits that have contrastive examples, sorted."""
        found = set()
        for folder in self.folders:
            for path in folder.glob("traits/*/*"):
                if path.is_dir() and all(map(is_safe_name, (path.parent.name, path.name))):
                    found.add(Trait(path.parent.name, path.name))
        return sorted(found)

    def trait_folder(self, trait: Trait) -> Path:
        """The folder of a trait's examples, preferably in the root; raises `InputError` if there is none."""
        for folder in self.folders:
            path = folder / "traits" / trait.category / trait.name
            if path.is_dir():
                return path
        existing = ", ".join(map(str, self.traits())) or "none"
        raise InputError(
            f"no examples for trait {str(trait)!r}: expected the folder "
            f"{self.folders[0] / 'traits' / trait.category / trait.name}; existing traits: {existing}"
        )


@dataclass(frozen=True)
class Layout:
    """The paths of an experiment in a root. Creates no folders and reads no files, but lists folders.

    Methods that take a name from outside (prompt set, prompt id) raise `InputError` if it is not a safe file name. All
    paths are checked by `own`: a link that leads out of the experiment raises `StorageError`.
    """

    root: Path
    experiment: str

    def __post_init__(self) -> None:
        check_name(self.experiment, "experiment")

    @property
    def folder(self) -> Path:
        """The experiment's folder."""
        return self.root / "experiments" / self.experiment

    def check_exists(self) -> None:
        """Raise `InputError` with the existing experiments if this one does not exist."""
        if not self.folder.is_dir():
            existing = sorted(path.name for path in self.folder.parent.glob("*") if path.is_dir())
            listed = ", ".join(existing) or "none"
            raise InputError(
                f"no experiment {self.experiment!r}: expected the folder {self.folder}; existing experiments: {listed}"
            )

    def own(self, path: Path) -> Path:
        """Return a path below the experiment's folder, or raise `StorageError` if it contains a link that leads out.

        The folder itself, `experiments/` and the root may be links, for example to another disk.
        """
        link = self._leads_out(path)
        if link is not None:
            raise StorageError(f"{link}: a link that leads out of the experiment {self.folder} is not followed")
        return path

    def _leads_out(self, path: Path) -> Path | None:
        """The first link below the experiment's folder, on the way to `path`, that leads out of it."""
        below = str(self.folder)
        for part in path.parts[len(self.folder.parts) :]:
            below = join(below, part)
            # Only links are resolved, since that is slow. A link to itself resolves to itself, within the experiment.
            if islink(below) and not Path(realpath(below)).is_relative_to(realpath(self.folder)):
                return Path(below)
        return None

    def _listed(self, pattern: str) -> list[Path]:
        """Paths below the experiment's folder that match a pattern, sorted; none behind links that lead out."""
        return sorted(path for path in self.folder.glob(pattern) if self._leads_out(path) is None)

    @property
    def config(self) -> Path:
        """The experiment's `config.json`."""
        return self.own(self.folder / "config.json")

    def lock(self, name: str) -> Path:
        """The lock file for something that two runs must not do at the same time in this experiment."""
        return self.own(self.folder / ".locks" / f"{name.replace('/', '-')}.lock")

    def shard_lock(self, name: str, shard: str) -> Path:
        """The lock file for a shard of what `lock(name)` is for."""
        return self.lock(name).with_suffix(".shards") / f"{shard}.lock"

    def shard_locks(self, name: str) -> list[Path]:
        """The lock files of all shards that have ever run, sorted."""
        return sorted(self.lock(name).with_suffix(".shards").glob("*.lock"))

    def run_record(self, name: str) -> Path:
        """The record of a run."""
        return self.own(self.folder / "runs" / f"{name}.json")

    # -- captures ---------------------------------------------------------------------------------

    def residual(self, prompt_set: str, prompt_id: str) -> Path:
        """The raw residual file of a prompt, its capture."""
        return self.own(self._raw("residual", prompt_set) / f"{check_name(prompt_id, 'prompt id')}.pt")

    def unfinished(self, prompt_set: str, prompt_id: str) -> Path:
        """The marker file of a prompt whose files are being written, or were being written by a run that was killed."""
        return self.own(self._raw("residual", prompt_set) / f".{check_name(prompt_id, 'prompt id')}.unfinished")

    def internals(self, prompt_set: str, prompt_id: str, layer: int) -> Path:
        """The internals file of a prompt and layer."""
        folder = self._raw("internals", prompt_set)
        return self.own(folder / f"{check_name(prompt_id, 'prompt id')}_L{layer}.pt")

    def all_internals(self, prompt_set: str, prompt_id: str) -> list[Path]:
        """The existing internals files of a prompt, of all layers."""
        stem = check_name(prompt_id, "prompt id")
        folder = self.own(self._raw("internals", prompt_set))
        return [self.own(path) for path in folder.glob(f"{stem}_L*.pt") if path.stem[len(stem) + 2 :].isdigit()]

    def attention(self, prompt_set: str, prompt_id: str) -> Path:
        """The attention file of a prompt."""
        return self.own(self._analysis(prompt_set) / f"{check_name(prompt_id, 'prompt id')}_attention.json")

    def logit_lens(self, prompt_set: str, prompt_id: str) -> Path:
        """The logit-lens file of a prompt."""
        return self.own(self._analysis(prompt_set) / f"{check_name(prompt_id, 'prompt id')}_logit_lens.json")

    def captured_prompt_sets(self) -> list[str]:
        """The prompt sets with at least one capture, sorted."""
        found = self._listed("inference/raw/residual/*")
        return [path.name for path in found if is_safe_name(path.name) and self.captured(path.name)]

    def captured(self, prompt_set: str) -> list[str]:
        """The ids of captured prompts of a set: numbers in numerical order, then names."""
        found = (path.stem for path in self.own(self._raw("residual", prompt_set)).glob("*.pt"))
        return sorted(filter(is_safe_name, found), key=_natural)

    def prompt_ids(self, prompt_set: str) -> list[str]:
        """The ids of prompts with a capture or projections: numbers in numerical order, then names."""
        projected = {path.stem for folder in self._projected(prompt_set) for path in folder.glob("*.json")}
        return sorted({*self.captured(prompt_set), *filter(is_safe_name, projected)}, key=_natural)

    def prompt_sets(self) -> list[str]:
        """The prompt sets with a capture or projections, sorted."""
        projected = {folder.name for folder in self._projected("*") if any(folder.glob("*.json"))}
        return sorted({*self.captured_prompt_sets(), *filter(is_safe_name, projected)})

    def _projected(self, prompt_set: str) -> list[Path]:
        """The projection folders of a prompt set, or of all sets for `*`, for all traits and components."""
        pattern = "*" if prompt_set == "*" else check_name(prompt_set, "prompt set")
        streams = STREAM_FOLDERS.values()
        found = [path for stream in streams for path in self._listed(f"inference/*/*/{stream}/{pattern}")]
        return [path for path in found if path.relative_to(self.folder / "inference").parts[0] != "raw"]

    # -- traits -----------------------------------------------------------------------------------

    def vectors(self, trait: Trait) -> Path:
        """The folder of a trait's vectors."""
        return self.own(self.folder / "extraction" / trait.category / trait.name / "vectors")

    def traits(self) -> list[Trait]:
        """The traits with a folder of vectors, sorted."""
        names = ((path.parent.parent.name, path.parent.name) for path in self._listed("extraction/*/*/vectors"))
        return sorted(Trait(*pair) for pair in names if all(map(is_safe_name, pair)))

    @property
    def evaluation(self) -> Path:
        """The evaluation file of the experiment's vectors."""
        return self.own(self.folder / "extraction" / "extraction_evaluation.json")

    def reference(self, component: str) -> Path:
        """The mean activations on the packaged prompts, of a component, beside the vectors."""
        name = "reference.pt" if component == "residual" else f"{component}_reference.pt"
        return self.own(self.folder / "extraction" / name)

    def steering(self, trait: Trait) -> Path:
        """The steering results of a trait."""
        return self.own(self.folder / "steering" / trait.category / trait.name / "results.json")

    def projection(self, trait: Trait, component: str, prompt_set: str, prompt_id: str) -> Path:
        """The projection file of a prompt onto a trait's vector; `component` is `residual` or `attn_out`."""
        folder = self.folder / "inference" / trait.category / trait.name / STREAM_FOLDERS[component]
        name = f"{check_name(prompt_id, 'prompt id')}.json"
        return self.own(folder / check_name(prompt_set, "prompt set") / name)

    def all_projections(self, prompt_set: str, prompt_id: str) -> list[Path]:
        """The existing projection files of a prompt, for all traits and components, sorted."""
        check_name(prompt_set, "prompt set")
        name = f"{check_name(prompt_id, 'prompt id')}.json"
        inference = self.folder / "inference"
        return sorted(
            self.own(path)
            for stream in STREAM_FOLDERS.values()
            for path in inference.glob(f"*/*/{stream}/{prompt_set}/{name}")
        )

    def projection_folders(self, prompt_set: str) -> list[tuple[Trait, str]]:
        """Trait and component of all projection folders of a prompt set, or of all sets for `*`, sorted."""
        pattern = "*" if prompt_set == "*" else check_name(prompt_set, "prompt set")
        found = set()
        for component, stream in STREAM_FOLDERS.items():
            for path in self._listed(f"inference/*/*/{stream}/{pattern}"):
                category, name = path.parents[2].name, path.parents[1].name
                if is_safe_name(category) and is_safe_name(name):
                    found.add((Trait(category, name), component))
        return sorted(found)

    def of_projection(self, path: Path) -> tuple[Trait, str]:
        """Trait and component of a projection file, from its path."""
        stream, name, category = path.parents[1], path.parents[2].name, path.parents[3].name
        components = {folder: component for component, folder in STREAM_FOLDERS.items()}
        return Trait(category, name), components[stream.name]

    def picture(self, trait: Trait, kind: str) -> Path:
        """The PNG file of a trait; `kind` is `evaluation` or `steering`."""
        folder = self.vectors(trait).parent if kind == "evaluation" else self.steering(trait).parent
        return self.own(folder / f"{kind}.png")

    # -- parts ------------------------------------------------------------------------------------

    def _raw(self, kind: str, prompt_set: str) -> Path:
        return self.folder / "inference" / "raw" / kind / check_name(prompt_set, "prompt set")

    def _analysis(self, prompt_set: str) -> Path:
        return self.folder / "analysis" / "per_token" / check_name(prompt_set, "prompt set")


def _natural(name: str) -> tuple[int, int, str]:
    """Sort key: numbers in numerical order, then names."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def derived_files(layout: Layout, prompt_set: str, prompt_id: str) -> list[Path]:
    """The existing files that were made from a prompt's raw residual: attention, logit lens, internals, projections."""
    files = [layout.attention(prompt_set, prompt_id), layout.logit_lens(prompt_set, prompt_id)]
    files += layout.all_internals(prompt_set, prompt_id) + layout.all_projections(prompt_set, prompt_id)
    return [path for path in files if path.is_file()]
