"""`tlcapture import`: a folder that `tlcapture export` wrote becomes an experiment again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tlcapture.errors import InputError, StorageError
from tlcapture.exchange.exported import ExportedCapture, restore
from tlcapture.exchange.manifest import Manifest, check_digests, read_manifest
from tlcapture.exchange.parquet import read_parquet
from tlcapture.exchange.single_files import read_single_files
from tlcapture.runs.display import Display
from tlcapture.storage.experiments.layout import Layout
from tlcapture.storage.remote.roots import discard_folder, is_incomplete
from tlcapture.storage.whole_folders import write_folder
from tlcapture.traits.vector_sources.exported import restore_vectors


@dataclass(frozen=True)
class Imported:
    """The counts of what was made: captures with activations, captures with projections only, and vector files."""

    manifest: Manifest
    n_captures: int
    n_without_activations: int
    n_files: int


def run_import_experiment(layout: Layout, folder: Path, display: Display) -> Imported:
    """Make an experiment from an export, complete or not at all.

    Raises:
        InputError: it is not an export, or the experiment exists.
        StorageError: the export is damaged, or the experiment cannot be written.
    """
    manifest = read_manifest(folder)
    if is_incomplete(layout.folder):
        discard_folder(layout.folder)
    if layout.folder.exists():
        raise InputError(
            f"experiment {layout.experiment!r} exists already, and nothing is imported into it: choose another name"
        )
    found: list[Imported] = []

    def fill(temporary: Path) -> None:
        # An experiment of this name in a root of its own, whose content then moves to where the experiment will be.
        inner = Layout(temporary / "root", layout.experiment)
        found.append(_restore_all(inner, folder, manifest, display))
        for each in inner.folder.iterdir():
            each.rename(temporary / each.name)
        for empty in (inner.folder, inner.folder.parent, inner.root):
            empty.rmdir()

    write_folder(layout.folder, fill)
    return found[0]


def _restore_all(layout: Layout, folder: Path, manifest: Manifest, display: Display) -> Imported:
    layout.folder.mkdir(parents=True)
    files = restore_vectors(layout, folder)
    n_captures = n_without = n_files = 0
    with display.progress(manifest.n_captures, "import", "capture") as progress:
        for exported in _captures(folder, manifest):
            written = restore(layout, exported, folder)
            n_captures, n_files = n_captures + 1, n_files + len(written)
            raw = layout.residual(exported.record["prompt_set"], exported.record["file"])
            n_without += not raw.is_file()
            progress.advance(1)
    if n_captures != manifest.n_captures:
        raise StorageError(f"{folder}: {n_captures} captures, but it states {manifest.n_captures}: it is incomplete")
    check_digests(folder, manifest)  # last, since what cannot be read has been said more precisely
    return Imported(manifest, n_captures, n_without, n_files + len(files))


def _captures(folder: Path, manifest: Manifest) -> Iterator[ExportedCapture]:
    if manifest.format in ("datasets", "parquet"):
        return read_parquet(folder)
    return read_single_files(folder, f".{manifest.format}")
