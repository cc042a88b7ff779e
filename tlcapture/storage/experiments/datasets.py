"""The prompt sets and trait examples of a root, and those that come with the package.

    root/datasets/inference/{prompt_set}.json             (a set in a subfolder has its path as its name: general/mine)
    root/datasets/traits/{category}/{trait}/

What a root's `datasets/` does not have is looked up in the installed package.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tlcapture.errors import InputError
from tlcapture.names import Trait, check_prompt_set, is_prompt_set, is_safe_name
from tlcapture.storage.folders import folders_in, stems_in, subfolders
from tlcapture.storage.regular_files import check_regular, is_folder
from tlcapture.text import beside


def shipped_datasets() -> Path:
    """The `datasets/` folder of the package: inside the package if installed from a wheel, next to it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    inside = package / "datasets"
    return inside if inside.is_dir() else package.parent / "datasets"


@dataclass(frozen=True)
class Datasets:
    """The prompt sets and trait examples of a root, and after them those of the package."""

    root: Path

    @property
    def folders(self) -> list[Path]:
        """The folders to search, in order."""
        return [self.root / "datasets", shipped_datasets()]

    def prompt_sets(self) -> list[str]:
        """The names of all prompt sets, sorted, those in subfolders included."""
        return [name for name in self.prompt_set_files() if is_prompt_set(name)]

    def prompt_set_files(self) -> dict[str, Path]:
        """The files of all prompt sets by name, sorted, preferably in the root; a name need not be a valid one."""
        found: dict[str, Path] = {}
        for folder in (each / "inference" for each in self.folders):
            for below, parent in [("", folder), *subfolders(folder)]:
                for stem in stems_in(parent, ".json"):
                    path = parent / f"{stem}.json"
                    if not stem.startswith(".") and not path.is_dir():
                        found.setdefault(below + stem, path)
        return dict(sorted(found.items()))

    def prompt_set_file(self, name: str) -> Path:
        """The file of a prompt set, preferably in the root.

        Raises:
            InputError: there is none.
            StorageError: the root has something that is not a file in its place, or in the place of its folder.
        """
        check_prompt_set(name)
        for folder in self.folders:
            path = folder / "inference" / f"{name}.json"
            check_regular(path)
            if is_folder(path.parent) and path.is_file():
                return path
        meant = name.rpartition("inference/")[2].removesuffix(".json")  # of a path
        raise InputError(
            f"no prompt set {name!r}: looked for {self.folders[0] / 'inference' / (name + '.json')} and in the package"
            f"{beside(meant, self.prompt_sets(), 'existing sets')}"
        )

    def traits(self, *, own: bool = False) -> list[Trait]:
        """All traits that have contrastive examples, or the root's `own` ones alone, sorted."""
        found: set[Trait] = set()
        for folder in self.folders[:1] if own else self.folders:
            for category in filter(is_safe_name, folders_in(folder / "traits")):
                names = filter(is_safe_name, folders_in(folder / "traits" / category))
                found.update(Trait(category, name) for name in names)
        return sorted(found)

    def trait_folder(self, trait: Trait) -> Path:
        """The folder of a trait's examples, preferably in the root.

        Raises:
            InputError: there is none.
            StorageError: the root has something that is not a folder in its place.
        """
        for folder in self.folders:
            path = folder / "traits" / trait.category / trait.name
            if is_folder(path):
                return path
        raise InputError(
            f"no examples for trait {str(trait)!r}: expected positive.jsonl and negative.jsonl in the folder "
            f"{self.folders[0] / 'traits' / trait.category / trait.name}"
            f"{beside(str(trait), map(str, self.traits()), 'existing traits')}"
        )
