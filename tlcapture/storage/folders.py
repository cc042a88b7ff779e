"""Listing folders, and the order of names."""

from __future__ import annotations

import errno
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache, wraps
from os import DirEntry, listdir, scandir, stat
from os.path import exists
from pathlib import Path
from time import monotonic, time_ns
from typing import TypeVar

from tlcapture.errors import refused_path
from tlcapture.names import MOST_FOLDERS, split_name
from tlcapture.storage.regular_files import is_folder

_NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_SETTLED = 2 * 10**9  # nanoseconds after a change in which another one may leave a folder's time as it is
_AGAIN = 30.0  # seconds after which a folder is read again whatever its time, which some file systems do not keep
Found = TypeVar("Found")


def state_of(folders: Iterable[Path]) -> Hashable | None:
    """A value that stays the same while names in some folders, and the files behind them, do; `None` if it may not yet.

    Files are replaced by renaming, which changes the time of their folder. Other programs may write to them in place,
    or use a file system without these times, so the value changes from time to time, too.
    """
    times = [_changed(each) for each in folders]
    if any(time_ns() - time < _SETTLED for time in times):
        return None
    return (*times, int(monotonic() / _AGAIN))


def _changed(folder: Path) -> int:
    """When the names in a folder have changed, in nanoseconds since the epoch; 0 where there is none."""
    with suppress(OSError):
        return stat(folder).st_mtime_ns
    return 0


def while_unchanged(most: int) -> Callable[[Callable[[Path], Found]], Callable[[Path], Found]]:
    """Decorates a function of the names in a folder: it is called again only when they have changed.

    `most` is the number of folders whose results are kept.
    """

    def decorate(find: Callable[[Path], Found]) -> Callable[[Path], Found]:
        @lru_cache(maxsize=most)
        def found_at(folder: Path, _state: Hashable) -> Found:
            return find(folder)

        @wraps(find)
        def found(folder: Path) -> Found:
            state = state_of([folder])
            return find(folder) if state is None else found_at(folder, state)

        return found

    return decorate


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
    for name in _shown_in(folder) if depth else ():
        yield f"{name}/", folder / name
        for below, path in subfolders(folder / name, depth - 1):
            yield f"{name}/{below}", path


@while_unchanged(2**14)
def _shown_in(folder: Path) -> tuple[str, ...]:
    """The names of the folders in a folder, sorted, hidden ones apart."""
    with _absent, scandir(folder) as entries:
        return tuple(sorted(each.name for each in entries if _is_folder(each) and not each.name.startswith(".")))
    return ()


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


def holds_any(folder: Path, suffix: str, is_wanted: Callable[[str], bool] = lambda stem: True) -> bool:
    """Whether anything in a folder ends in `suffix`, with a wanted name before it; reads no more than it needs."""
    with _absent, scandir(folder) as entries:
        return any(each.name.endswith(suffix) and is_wanted(each.name[: -len(suffix)]) for each in entries)
    return False


def natural(name: str) -> tuple[int, int, str, int]:
    """Sort key: numbers in numerical order, then names, each followed by its samples."""
    prompt_id, sample = split_name(name)
    number = (0, int(prompt_id)) if prompt_id.isdecimal() else (1, 0)
    return (*number, prompt_id, sample or 0)
