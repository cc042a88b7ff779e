"""What is at the place of a file, and is not one: a folder, a pipe, a link to what is not there."""

from __future__ import annotations

from os.path import lexists
from pathlib import Path

from tlcapture.errors import StorageError


def check_regular(path: Path) -> None:
    """Raise `StorageError` for what is there and is not a regular file.

    A link to what is not there is an error too: it may be on a disk that is not mounted.
    """
    if path.is_file() or not lexists(path):
        return
    if path.is_symlink() and not path.exists():
        raise StorageError(f"{path}: a link to {path.readlink()}, which is not there: mount what it is on")
    found = "a folder" if path.is_dir() else "something that is not a regular file"
    raise StorageError(f"{path}: expected a file, found {found}: move it")
