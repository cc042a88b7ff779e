"""The vectors that come with the package: for the shipped traits and the embedded model.

    datasets/packaged/vectors/{category}/{trait}.safetensors, evaluation.json ...    as `export` writes them

If an experiment of the embedded model has no vectors of its own, these take their place, as the experiment
`packaged`. It is unpacked on first use, into the folder of the converted model. An experiment of that name in the root
is taken instead. `make packaged-vectors` makes the files. Importing this module loads no torch.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

from tlcapture.errors import StorageError
from tlcapture.models.checkpoints.embedded import NAME
from tlcapture.storage.cache_folder import cache_folder
from tlcapture.storage.experiments.config import read_config
from tlcapture.storage.experiments.datasets import shipped_datasets
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.whole_folders import write_folder
from tlcapture.text import counted
from tlcapture.traits.missing_vectors import PACKAGED

NOTHING_TO_PROJECT_ONTO = f"no trait vectors to project onto: those that come with the package are of {NAME} alone"
PROJECTED_ONTO_PACKAGED = "no trait vectors of its own: projected onto those that come with the package"


def vectors_layout(root: Path, experiment: str) -> Layout:
    """The experiment to take vectors from, by name: one in the root, or the package's, `packaged`."""
    own = Layout(root, experiment)
    return own if experiment != PACKAGED or own.folder.is_dir() else packaged_layout()


def takes_packaged(layout: Layout, model: str | None) -> bool:
    """Whether an experiment has no vectors, and the package has some for its model, given by name."""
    return model == NAME and not layout.traits() and packaged_files().is_dir()


def listed_vectors(layout: Layout) -> str:
    """A text that lists the traits with vectors in an experiment, or says that it takes the package's."""
    traits = layout.traits()
    if not traits and takes_packaged(layout, read_config(layout).inference_model):
        return "vectors: none of its own, so those that come with the package"
    return f"vectors of {counted(len(traits), 'trait')}: {', '.join(map(str, traits)) or 'none'}"


def packaged_files() -> Path:
    """The folder of the package that holds them."""
    return shipped_datasets() / PACKAGED


def packaged_layout() -> Layout:
    """The experiment `packaged`, unpacked if it has not been.

    Raises `StorageError` if it cannot be written.
    """
    root = cache_folder() / f"{PACKAGED}-{_digest(packaged_files())}"
    if not root.is_dir():
        write_folder(root, _unpack)
    if not root.is_dir():
        raise StorageError(f"{root}: the packaged vectors could not be written: is the folder writable?")
    return Layout(root, PACKAGED)


def _unpack(root: Path) -> None:
    from tlcapture.traits.vector_sources.exported import restore_vectors

    restore_vectors(Layout(root, PACKAGED), packaged_files())


@lru_cache(maxsize=1)
def _digest(folder: Path) -> str:
    """A digest of the files of a folder and of their names."""
    found = blake2b(digest_size=8)
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        found.update(path.relative_to(folder).as_posix().encode() + b"\0")
        found.update(path.read_bytes())
    return found.hexdigest()
