"""Checks for files that are something else, a folder, a pipe, a dangling link, and for folders that are closed."""

from __future__ import annotations

import os
from os.path import lexists
from pathlib import Path

from tlcapture.errors import StorageError


def check_regular(path: Path) -> None:
    """Raise `StorageError` for a path that exists but is not a regular file.

    A dangling link is an error too: its target may be on a disk that is not mounted.
    """
    if path.is_file() or not lexists(path):
        return
    if path.is_symlink() and not path.exists():
        raise StorageError(f"{path}: a link to {path.readlink()}, which does not exist: mount the disk it is on")
    found = "a folder" if path.is_dir() else "something that is not a regular file"
    raise StorageError(f"{path}: expected a file, found {found}: move it")


def check_open(folder: Path) -> None:
    """Raise `StorageError` for a folder that this user may not read."""
    if not os.access(folder, os.R_OK | os.X_OK):
        raise StorageError(f"{folder}: cannot be read: Permission denied")
