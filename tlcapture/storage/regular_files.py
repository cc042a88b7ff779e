"""Checks for files that are something else, a folder, a pipe, a dangling link, and for folders that are closed."""

from __future__ import annotations

import errno
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
    raise _unexpected(path, "a file")


def is_folder(path: Path) -> bool:
    """Whether there is a folder; raises `StorageError` where there is something else, at the path or above it.

    What such a folder would hold must not count as missing.
    """
    for each in (path, *path.parents):
        if each.is_dir():
            return each == path
        if lexists(each):
            raise _unexpected(each, "a folder")
    return False


def in_place_of_folder(path: Path) -> str | None:
    """What is in the place of a folder, or of one above it, as text; `None` if there is nothing else than folders."""
    try:
        is_folder(path)
    except (StorageError, OSError) as error:
        return str(error) if isinstance(error, StorageError) else None
    return None


def _unexpected(path: Path, expected: str) -> StorageError:
    """The error for a path at which something else is than was expected."""
    if path.is_symlink() and not path.exists():
        try:
            path.stat()
        except OSError as error:
            if error.errno == errno.ELOOP:
                return StorageError(f"{path}: expected {expected}, found a link that leads back to itself: remove it")
        return StorageError(f"{path}: a link to {path.readlink()}, which does not exist: mount the disk it is on")
    found = (
        "a folder" if path.is_dir() else "a file" if path.is_file() else "something that is neither a file nor a folder"
    )
    return StorageError(f"{path}: expected {expected}, found {found}: move it")


def check_open(folder: Path) -> None:
    """Raise `StorageError` for a folder that this user may not read."""
    if not os.access(folder, os.R_OK | os.X_OK):
        raise StorageError(f"{folder}: cannot be read: Permission denied")
