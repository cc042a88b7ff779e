"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tlcapture.errors import NoSpaceError, StorageError
from tlcapture.storage.cache_folder import cache_folder
from tlcapture.storage.files import FOR_ALL_FILES
from tlcapture.storage.remote.roots import publish_folder
from tlcapture.storage.temporary_files import sweep_temporaries, temporary_path
from tlcapture.text import first_line


def write_folder(path: Path, fill: Callable[[Path], None], *, replaces: bool = False) -> None:
    """Create a folder completely or not at all: `fill` writes to a temporary folder, which is renamed to `path`.

    With `replaces`, a folder that is there is removed once the new one is complete. Otherwise, if another process
    created the folder in the meantime, that one is kept.

    Raises:
        NoSpaceError: the device is full, over its quota or read-only.
        StorageError: the folder cannot be created for another reason.
    """
    temporary = temporary_path(path)
    try:
        temporary.mkdir(parents=True)
        sweep_temporaries(path.parent)
        fill(temporary)
        if replaces and path.exists():
            earlier = temporary_path(path)
            path.rename(earlier)
            try:
                temporary.rename(path)
            except BaseException:
                earlier.rename(path)
                raise
            earlier.unlink() if earlier.is_symlink() else shutil.rmtree(earlier)
            return
        with suppress(OSError):
            temporary.rename(path)
            publish_folder(path)
    except StorageError as error:
        raise type(error)(str(error).replace(str(temporary), str(path))) from None
    except Exception as error:
        number = _error_number(error)
        if number is None and not isinstance(error, OSError):
            raise
        hint = ": set TLCAPTURE_CACHE to another folder" if path.is_relative_to(cache_folder()) else ""
        kind = NoSpaceError if number in FOR_ALL_FILES else StorageError
        reason = os.strerror(number) if number else first_line(error)
        raise kind(f"{path}: cannot be created: {reason}{hint}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _error_number(error: Exception) -> int | None:
    """The number of the operating system's error, also of one that a library in Rust has put into words."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else error.errno if isinstance(error, OSError) else None
