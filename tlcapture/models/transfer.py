"""A model's files on their way to workers that do not have them: through Ray's object store, once a node.

A worker that sees the driver's own folder, or was sent the same files before, loads them from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tlcapture.models.embedded import cache_folder
from tlcapture.storage.files import read_bytes, write_bytes, write_folder
from tlcapture.storage.locks import locked

_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.bin")


@dataclass(frozen=True)
class ModelFiles:
    """The files of a checkpoint: the folder in which the driver has them, their names and sizes."""

    name: str
    folder: Path
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, name: str) -> ModelFiles:
        """Those of a model by the name that `load_model` takes; one of the hub is fetched, once."""
        from tlcapture.models.checkpoints import source_of

        folder = Path(source_of(name))
        if not folder.is_dir():
            folder = _snapshot(name)
        files = sorted({path for pattern in _WANTED for path in folder.glob(pattern) if path.is_file()})
        return cls(name, folder.resolve(), {path.name: path.stat().st_size for path in files})

    def found(self) -> Path | None:
        """Where these files are on this machine, if they are."""
        return next((folder for folder in (self.folder, self._copy()) if self._lie_in(folder)), None)

    def receive(self, content: Callable[[str], bytes]) -> Path:
        """Make a copy of the files in the cache folder, unless they are on this machine."""
        copy = self._copy()
        with locked(copy.with_name(f".{copy.name}.lock")):
            there = self.found()
            if there is None:
                write_folder(copy, lambda folder: self._fill(folder, content))
            return there or copy

    def send(self, name: str) -> bytes:
        return read_bytes(self.folder / name)

    def _fill(self, folder: Path, content: Callable[[str], bytes]) -> None:
        for name in self.sizes:
            write_bytes(folder / name, content(name))

    def _copy(self) -> Path:
        mark = hashlib.blake2b(repr((self.name, sorted(self.sizes.items()))).encode(), digest_size=8).hexdigest()
        return cache_folder() / f"sent-{mark}"

    def _lie_in(self, folder: Path) -> bool:
        return all((folder / name).is_file() and (folder / name).stat().st_size == n for name, n in self.sizes.items())


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download

    from tlcapture.errors import ModelError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED)))
    except Exception as error:  # the hub client has many
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"model {name!r} cannot be fetched: {reason}") from None
