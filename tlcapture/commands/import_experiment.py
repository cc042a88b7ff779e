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


@dataclass
class Imported:
    """The counts of what was made.

    Attributes:
        n_captures: captures of which anything was exported,
        n_without_activations: and of these, those with projections only.
        n_empty: captures that were exported with neither.
        n_files: files of captures and vectors.
    """

    manifest: Manifest
    n_captures: int = 0
    n_without_activations: int = 0
    n_empty: int = 0
    n_files: int = 0


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
    found = Imported(manifest, n_files=len(restore_vectors(layout, folder)))
    with display.progress(manifest.n_captures, "import", "capture") as progress:
        for exported in _captures(folder, manifest):
            written = restore(layout, exported, folder)
            raw = layout.residual(exported.record["prompt_set"], exported.record["file"])
            found.n_captures += bool(written)
            found.n_without_activations += bool(written) and not raw.is_file()
            found.n_empty += not written
            found.n_files += len(written)
            progress.advance(1)
    if (n_all := found.n_captures + found.n_empty) != manifest.n_captures:
        raise StorageError(f"{folder}: {n_all} captures, but it states {manifest.n_captures}: it is incomplete")
    check_digests(folder, manifest)  # last, since what cannot be read has been said more precisely
    return found


def _captures(folder: Path, manifest: Manifest) -> Iterator[ExportedCapture]:
    if manifest.format in ("datasets", "parquet"):
        return read_parquet(folder)
    return read_single_files(folder, f".{manifest.format}")
