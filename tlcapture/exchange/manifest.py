"""The manifest of an export, `tlcapture-export.json`: its form and contents."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from tlcapture.errors import InputError, StorageError
from tlcapture.storage.files import read_json, write_json
from tlcapture.storage.validation import Count, FileContent, checked

MANIFEST = "tlcapture-export.json"
CARD = "README.md"
Format = Literal["datasets", "parquet", "safetensors", "json"]
FORMAT_VERSION = 1


class Manifest(FileContent):
    """The form of an export, and what it holds.

    Attributes:
        n_captures: captures, including prompts whose projections alone were kept.
        layers, points: of the activations; no layers where none were exported.
        left_out: parts of the experiment that the export does not have.
        files: the other files: vectors, evaluation, steering, `config.json`.
        sha256: by name, the digest of each file but the manifest and the card; of an earlier version, none.
    """

    format_version: Annotated[int, Field(ge=1)]
    format: Format
    experiment: str
    model: str | None
    prompt_sets: list[str]
    n_captures: Count
    n_tokens: Count
    traits: list[str]
    layers: list[Count]
    points: list[str]
    dtype: str | None
    left_out: list[str]
    files: list[str] = Field(default_factory=list)
    sha256: dict[str, str] = Field(default_factory=dict)
    export_date: str
    tlcapture_version: str

    def write(self, folder: Path) -> None:
        """Write the manifest to the folder of an export."""
        write_json(folder / MANIFEST, self.model_dump(), indent=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        InputError: `tlcapture export` did not write the folder.
        StorageError: the export is damaged, incomplete, or of a later version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder}: not an export of tlcapture: it has no {MANIFEST}")
    value = read_json(path)
    version = value.get("format_version") if isinstance(value, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise StorageError(f"{path}: format version {version}, this tlcapture reads {FORMAT_VERSION}")
    found = checked(Manifest, value, path, "export")
    names = dict.fromkeys([*found.files, *found.sha256])
    if gone := [name for name in names if not (folder / name).is_file()]:
        more = f" and {len(gone) - 5} more" if len(gone) > 5 else ""
        raise StorageError(f"{folder}: it has no {', '.join(gone[:5])}{more}: it is incomplete")
    return found


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 digest of each file of an export, by its name, without the manifest and the card."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: _digest(path) for name, path in names.items() if name not in (MANIFEST, CARD)}


def check_digests(folder: Path, manifest: Manifest) -> None:
    """Raise `StorageError` for a file that has changed since it was exported."""
    for name, digest in manifest.sha256.items():
        if _digest(folder / name) != digest:
            raise StorageError(
                f"{folder / name}: damaged or changed since it was exported (sha256 in {MANIFEST}): restore it"
            )


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from None
