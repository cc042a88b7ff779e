"""Listing folders, and the order of names."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import suppress
from os import DirEntry, listdir, scandir, sep
from os.path import exists
from pathlib import Path

from tlcapture.errors import refused_path
from tlcapture.names import MOST_FOLDERS, split_name
from tlcapture.storage.regular_files import is_folder

_NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class _Absent:
    """A context that is left where a folder is absent; raises `StorageError` for one that cannot be read.

    Also for a file or a dangling link in its place. What the folder should hold would otherwise count as missing.
    """

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        """Whether there is nothing to list."""
        if not isinstance(error, OSError):
            return False
        if error.errno not in (*_NO_FOLDER, errno.ENAMETOOLONG):
            raise refused_path(error) from None
        if error.errno in _NO_FOLDER and isinstance(error.filename, str | Path):
            is_folder(Path(error.filename))
        return True


_absent = _Absent()


def subfolders(folder: Path, depth: int = MOST_FOLDERS) -> Iterator[tuple[str, Path]]:
    """The folders below a folder, hidden ones apart, each after its path relative to it: `a/`, `a/b/`."""
    names: list[str] = []
    with _absent, scandir(folder) as entries:
        names = sorted(each.name for each in entries if _is_folder(each) and not each.name.startswith("."))
    for name in names if depth else ():
        yield f"{name}/", folder / name
        for below, path in subfolders(folder / name, depth - 1):
            yield f"{name}/{below}", path


def folders_in(folder: Path | str, *, lost: bool = False) -> list[str]:
    """Names of the folders in a folder, links to folders too; with `lost`, also of links that lead to nothing."""
    with _absent, scandir(folder) as entries:
        return [entry.name for entry in entries if _is_folder(entry) or (lost and _is_lost(entry))]
    return []


def _is_folder(entry: DirEntry[str]) -> bool:
    with suppress(OSError):  # a link that leads back to itself
        return entry.is_dir()
    return False


def _is_lost(entry: DirEntry[str]) -> bool:
    return entry.is_symlink() and not exists(entry.path)


def paths_of_folders_in(folder: str) -> list[str]:
    """The paths of the folders in a folder, links to folders too."""
    return [f"{folder}{sep}{name}" for name in folders_in(folder)]


def stems_in(folder: Path, suffix: str) -> list[str]:
    """Names, without `suffix`, of everything in a folder that ends in it, including hidden files."""
    with _absent, scandir(folder) as entries:
        return [entry.name[: -len(suffix)] for entry in entries if entry.name.endswith(suffix)]
    return []


def names_in(folder: Path) -> frozenset[str]:
    """The names of everything in a folder."""
    with _absent:
        return frozenset(listdir(folder))
    return frozenset()


def holds_any(folder: Path, suffix: str) -> bool:
    """Whether anything in a folder ends in `suffix`; reads no more of the folder than it needs."""
    with _absent, scandir(folder) as entries:
        return any(entry.name.endswith(suffix) for entry in entries)
    return False


def natural(name: str) -> tuple[int, int, str, int]:
    """Sort key: numbers in numerical order, then names, each followed by its samples."""
    prompt_id, sample = split_name(name)
    number = (0, int(prompt_id)) if prompt_id.isdecimal() else (1, 0)
    return (*number, prompt_id, sample or 0)
