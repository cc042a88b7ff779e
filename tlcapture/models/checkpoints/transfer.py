"""Sending a model's files to workers that do not have them, once per node.

A worker that can read the driver's folder, or has received the same files before, loads them from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tlcapture.models.checkpoints.adapters import BASE, GIVEN, adapter_of
from tlcapture.storage.cache_folder import cache_folder
from tlcapture.storage.files import read_bytes, write_bytes
from tlcapture.storage.locks import locked
from tlcapture.storage.whole_folders import write_folder

_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.bin")


@dataclass(frozen=True)
class ModelFiles:
    """The files of a checkpoint.

    Attributes:
        name: as given to `load_model`.
        folder: where the driver has the files.
        sizes: bytes by file name; the files of an adapter's base model are sent as `base/...`.
        base: where the driver has the base model, for an adapter without full weights.
        adapter: where the driver has an adapter for the model, whose files are sent as `adapter/...`.
    """

    name: str
    folder: Path
    sizes: Mapping[str, int]
    base: Path | None = None
    adapter: Path | None = None

    @classmethod
    def of(cls, name: str, given: str | None = None) -> ModelFiles:
        """The files of a model by its name, and of an adapter for it; a model on the hub is downloaded once.

        Raises `ModelError` if the model is not found.
        """
        from tlcapture.models.checkpoints.sources import source_of

        source = source_of(name)
        adapter = adapter_of(source)
        folder = _folder_of(source)
        sizes = {path.name: path.stat().st_size for path in _files_in(folder)}
        own = None if given is None else _folder_of(str(Path(given).expanduser()))
        if own is not None:
            sizes |= {f"{GIVEN}/{path.name}": path.stat().st_size for path in _files_in(own)}
        if adapter is None or adapter.base == source:
            return cls(name, folder, sizes, adapter=own)
        base = _folder_of(source_of(adapter.base))
        sizes |= {f"{BASE}/{path.name}": path.stat().st_size for path in _files_in(base)}
        return cls(name, folder, sizes, base, own)

    def found(self) -> Path | None:
        """The folder with these files on this machine, if any."""
        if self._has_all(self._path):
            return self.folder
        return self._copy() if self._has_all(self._copy().joinpath) else None

    def receive(self, content: Callable[[str], bytes]) -> Path:
        """Copy the files to the cache folder, unless this machine has them; returns their folder.

        Args:
            content: returns the bytes of a file by its name.
        """
        copy = self._copy()
        with locked(copy.with_name(f".{copy.name}.lock")):
            existing = self.found()
            if existing is None:
                write_folder(copy, lambda folder: self._fill(folder, content))
            return existing or copy

    def send(self, name: str) -> bytes:
        """The content of a file."""
        return read_bytes(self._path(name))

    def _fill(self, folder: Path, content: Callable[[str], bytes]) -> None:
        for name in self.sizes:
            write_bytes(folder / name, content(name))

    def _copy(self) -> Path:
        digest = hashlib.blake2b(repr((self.name, sorted(self.sizes.items()))).encode(), digest_size=8).hexdigest()
        # A folder of the hub cache is named by its commit, which captures record.
        return cache_folder() / f"sent-{digest}" / self.folder.name

    def _path(self, name: str) -> Path:
        """Where the driver has a file."""
        if self.adapter is not None and name.startswith(f"{GIVEN}/"):
            return self.adapter / name.removeprefix(f"{GIVEN}/")
        inner = name.removeprefix(f"{BASE}/")
        return self.folder / name if self.base is None or inner == name else self.base / inner

    def _has_all(self, path: Callable[[str], Path]) -> bool:
        """Whether every file is where `path` says, with its size."""
        return all(path(name).is_file() and path(name).stat().st_size == n for name, n in self.sizes.items())


def _folder_of(source: str) -> Path:
    return Path(source).resolve()


def _files_in(folder: Path) -> list[Path]:
    return sorted({path for pattern in _WANTED for path in folder.glob(pattern) if path.is_file()})
